"""Feature extraction by a network of this project: as it is, compiled, or exported to another program."""
