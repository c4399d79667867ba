"""A finished run in use: loading it, and serving clients."""
