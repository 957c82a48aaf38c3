"""The node rules, a file for each family. Importing this package registers them."""

from torch_secorder.rules.nodes import broadcast, convolution, normalization, products, rows

__all__ = ["broadcast", "convolution", "normalization", "products", "rows"]
