"""What nodes do with labels: for each kind of node, the labels of its inputs' gradients from those of its outputs' gradients.

A rule says from which entries of its outputs' gradients an entry of an input's gradient is computed. It may name too many
entries, but never too few. A kind without a rule is assumed to compute every entry from all entries.

Rules stand by subject: functions of single entries and along axes in ``entries``, what only moves entries in ``views``, parts and
wholes in ``parts``, rows taken or put by an index in ``indices``, matrix products, attention and layers in ``products``.
Importing this package registers them all.
"""

from torch_secorder.batch_axis.label_rules import entries, indices, layers, parts, products, views
from torch_secorder.batch_axis.label_rules.registry import At, indices_of, labels_of_inputs, reads_tensors

__all__ = [
    "At",
    "entries",
    "indices",
    "indices_of",
    "labels_of_inputs",
    "layers",
    "parts",
    "products",
    "reads_tensors",
    "views",
]
