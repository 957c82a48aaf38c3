"""A model that the library runs itself: batches in, squared norms of per-sample gradients out, nothing of the user's changed."""
