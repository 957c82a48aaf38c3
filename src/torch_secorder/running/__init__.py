"""The library runs a model itself: batches go in, per-sample squared norms come out, and the model stays as it was."""
