"""What nodes do with labels: for each kind of node, the labels of its inputs' gradients from those of its outputs' gradients.

A rule says from which entries of its outputs' gradients an entry of an input's gradient is computed. It may name too many
entries, but never too few. A kind without a rule is assumed to compute every entry from all entries.

Rules stand by subject: functions of single entries and along axes in ``entries``, what only moves entries in ``views``, parts and
wholes in ``parts``, rows taken or put by an index in ``indices``, matrix products and attention in ``products``, norms, pooling
and other layers in ``layers``; those of nodes that have to be called before it is known what they do in ``written``,
``strided`` and ``asked``. Importing this package registers them all.
"""

from torch_secorder.batch_axis.label_rules import (
    asked,
    entries,
    indices,
    layers,
    parts,
    products,
    strided,
    views,
    written,
)
from torch_secorder.batch_axis.label_rules.asked import may_be_called
from torch_secorder.batch_axis.label_rules.registry import (
    COPY_SLICES,
    MASKED_SCATTER,
    PYTHON_FUNCTION,
    At,
    indices_of,
    kind_of,
    labels_of_inputs,
    question_of,
    reads_tensors,
)

__all__ = [
    "COPY_SLICES",
    "MASKED_SCATTER",
    "PYTHON_FUNCTION",
    "At",
    "asked",
    "entries",
    "indices",
    "indices_of",
    "kind_of",
    "labels_of_inputs",
    "layers",
    "may_be_called",
    "parts",
    "products",
    "question_of",
    "reads_tensors",
    "strided",
    "views",
    "written",
]
