"""Files: writing them completely or not at all, reading untrusted ones safely, and storing features in them."""
