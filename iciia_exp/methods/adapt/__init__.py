"""Methods with one module for all clients; a client only computes."""
