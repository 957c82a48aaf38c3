"""Where a tensor has its samples: what is said of it, the evidence for it, the search for that, and what is remembered."""
