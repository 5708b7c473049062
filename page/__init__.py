"""The result files of a test, and the page made of them."""
