"""Co-trained methods: cloud and devices train a network together, in rounds."""
