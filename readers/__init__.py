"""How data sets are stored on disk, one module per format. Each returns a `readers.tree.Dataset`."""
