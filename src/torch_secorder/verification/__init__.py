"""Whether the numbers are right: samples alone, sums of gradients, and when to look."""
