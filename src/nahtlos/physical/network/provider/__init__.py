"""Networks of the cloud that are one with a network outside of it, by an interface of every host."""
