"""One backward pass: captured calls in, squared norms of per-sample gradients out."""
