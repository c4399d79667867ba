"""Methods that learn from a client's own labels."""
