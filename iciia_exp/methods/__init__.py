"""Client-adaptive methods on a common interface, one file each: forward, loss and cost."""
