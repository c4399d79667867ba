"""Readers of files that several datasets use."""
