"""Files: written as a whole or not at all, foreign ones read safely, and those that hold features."""
