"""A check of the numbers on the user's own model: the library's result beside that of a plain float64 loop over samples.

The loop is the straightforward one: each sample runs alone through the model, then ``backward``, then the square of the gradient.
No hook, rule or formula of the library takes part in it. The library's own tests compare with it, too.
"""

from torch_secorder.testing.check import check
from torch_secorder.testing.sample_loop import sample_gradients

__all__ = ["check", "sample_gradients"]
