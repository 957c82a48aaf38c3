"""Per-sample gradients in factored form: all numerics and every choice of algorithm.

The gradient of one parameter for samples n = 1..N is a tensor ``[n, *shape]`` that is almost never formed. Axis legend
of the factors, used in this whole package::

    n  sample        k  weight group (grouped convolutions)        t  position that shares the weight
    i  feature of the layer's input a        o  feature of the gradient g of the layer's output

Every form answers the same questions (squared norm per sample, sum of squares over samples, inner product, sum with
another form, total over samples, dense); :class:`PerSampleGradient` answers them all from the dense tensor of a few
samples at a time, and a form overrides what its factors give more cheaply.
"""

from torch_secorder.per_sample._base import Dense, PerSampleGradient, Sum, direction, row_squares, widened
from torch_secorder.per_sample.budget import checked_budget, limited
from torch_secorder.per_sample.carried import Carried
from torch_secorder.per_sample.convolution import Convolution
from torch_secorder.per_sample.outer import Factor, Outer
from torch_secorder.per_sample.rows import Rows
from torch_secorder.per_sample.scarce import explained, in_halves
from torch_secorder.per_sample.squares import Squares

__all__ = [
    "Carried",
    "Convolution",
    "Dense",
    "Factor",
    "Outer",
    "PerSampleGradient",
    "Rows",
    "Squares",
    "Sum",
    "checked_budget",
    "direction",
    "explained",
    "in_halves",
    "limited",
    "row_squares",
    "widened",
]
