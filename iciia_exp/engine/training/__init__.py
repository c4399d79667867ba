"""Training and extraction with Lightning."""
