"""Routed methods: a request goes to the small model of the device or to the large one of the cloud."""
