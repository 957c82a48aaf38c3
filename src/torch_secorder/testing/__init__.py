"""Whether the numbers are right on a model of one's own: a plain loop over samples in float64, beside the library's answer.

The loop is what everybody would write who had the time: each sample alone through the model, ``backward``, the square of the
gradient. No hook, rule or formula of the library takes part in it. The library's own tests compare with it too.
"""

from torch_secorder.testing.check import check
from torch_secorder.testing.sample_loop import sample_gradients

__all__ = ["check", "sample_gradients"]
