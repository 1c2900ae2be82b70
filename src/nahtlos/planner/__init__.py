"""Pure functions from intent, inventory and parent blueprint to the next blueprint and a report."""
