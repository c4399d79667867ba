"""Serving: loading a finished run, and serving clients with it."""
