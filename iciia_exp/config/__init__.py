"""Configuration: from a composed configuration to checked objects."""
