"""nahtlos: a software-defined cloud that is upgraded while it runs."""

__version__ = "0.1.0"
