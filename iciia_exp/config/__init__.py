"""From a composed configuration to checked objects."""
