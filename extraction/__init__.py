"""What computes the features of images: a network of this project, compiled, or exported to another program."""
