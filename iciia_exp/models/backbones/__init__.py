"""The backbones: interface, networks, weights, and preparation for inference."""
