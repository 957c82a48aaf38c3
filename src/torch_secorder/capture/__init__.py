"""From the user's own forward and backward to one record per call of a module. No mathematics."""
