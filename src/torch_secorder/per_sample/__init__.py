"""Per-sample gradients in factored form: all numerics and every choice of algorithm.

The gradient of one parameter for samples n = 1..N is a tensor ``[n, *shape]`` that is almost never formed. Axis legend
of the factors, used in this whole package::

    n  sample        k  weight group (grouped convolutions)        t  position that shares the weight
    i  feature of the layer's input a        o  feature of the gradient g of the layer's output

Every form answers the same questions: squared norm per sample, sum of squares over samples, inner product, sum with
another form, total over samples, dense. :class:`PerSampleGradient` answers them all from the dense tensor of a few
samples at a time, and says which members a new form must define. A form overrides what its factors give more cheaply.

Each form has a file: ``outer`` (the gradient of a matrix that multiplies data; with ``gram`` and ``outer_channels``),
``convolution`` (with ``convolution_gram`` and ``convolution_products``), ``row_sparse`` (embeddings), ``routed`` (experts) and
``pulled_back`` (a parameter that reaches the data through other tensors); ``_base`` has what forms do with each other, a dense
tensor and a sum of unlike terms. ``dense_answers`` answers every question from the dense tensor, and ``arithmetic`` has the
operations on plain tensors that the forms share. ``square_sum`` keeps a diagonal factored until its pass is accepted. ``costs``
predicts which way to a convolution's norms is the fastest, ``profiles`` says what is cheap on a device, ``budget`` bounds the
memory of all forms, and ``out_of_memory`` handles allocations that fail.
"""

from torch_secorder.per_sample._base import Dense, PerSampleGradient, Sum
from torch_secorder.per_sample.arithmetic import (
    FULL,
    at_least_float32,
    cancellation_floor,
    in_rows,
    one_direction,
    real_entries,
    sign_vectors,
    squared_norm_of_rows,
    sum_over,
    zero_squared_norms,
)
from torch_secorder.per_sample.budget import memory_limit
from torch_secorder.per_sample.convolution import Convolution
from torch_secorder.per_sample.gram import SharedFactor
from torch_secorder.per_sample.out_of_memory import (
    as_refusal,
    direct_squared_norms_of,
    halving_on_oom,
    norms_of,
    squared_norms_of,
    squared_norms_of_each,
    unguarded_squared_norms_of,
)
from torch_secorder.per_sample.outer import Outer
from torch_secorder.per_sample.pulled_back import PulledBack
from torch_secorder.per_sample.routed import Routed
from torch_secorder.per_sample.row_sparse import RowSparse
from torch_secorder.per_sample.square_sum import SquareSum

__all__ = [
    "FULL",
    "Convolution",
    "Dense",
    "Outer",
    "PerSampleGradient",
    "PulledBack",
    "Routed",
    "RowSparse",
    "SharedFactor",
    "SquareSum",
    "Sum",
    "as_refusal",
    "at_least_float32",
    "cancellation_floor",
    "direct_squared_norms_of",
    "halving_on_oom",
    "in_rows",
    "memory_limit",
    "norms_of",
    "one_direction",
    "real_entries",
    "sign_vectors",
    "squared_norm_of_rows",
    "squared_norms_of",
    "squared_norms_of_each",
    "sum_over",
    "unguarded_squared_norms_of",
    "zero_squared_norms",
]
