"""What servers say and are told on their serial consoles, and their displays, over moves and replacements."""
