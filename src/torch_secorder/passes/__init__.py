"""What one backward pass adds up to: captured calls in, squared norms of per-sample gradients out."""

from torch_secorder.passes.collected import HALF, Pass
from torch_secorder.passes.samples import Samples
from torch_secorder.passes.small import TOGETHER

__all__ = ["HALF", "TOGETHER", "Pass", "Samples"]
