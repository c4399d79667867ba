"""Data: datasets, the feature store, partitions into clients, and padded client batches."""
