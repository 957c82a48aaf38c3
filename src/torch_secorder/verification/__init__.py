"""Checks that the numbers are right: samples alone, sums of gradients, and the schedule of the checks."""
