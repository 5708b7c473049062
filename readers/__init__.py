"""What a data set is on disk, one file each. Each gives a `readers.tree.Dataset`."""
