"""The autograd graph as the second way in: every use of every parameter, in or outside of its module's forward.

Walking back from the model's outputs finds each node that consumes a parameter. Uses inside the call of a hooked module are
that call's business. For all others, the parameter travels through a batch-free chain (a transpose, a chunk, a weight norm;
often nothing) to the frontier, the first node whose output has samples, and a hook there receives the gradient while it still
has them. The same walk shows which modules were called without a batch axis at all, such as position embeddings: their output is
one more batch-free value on its way to a frontier.
"""

from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import Use
from torch_secorder.graph.head import last_product
from torch_secorder.graph.look import Memory, memory_of, one_at_a_time
from torch_secorder.graph.walk import used_by_loss, without_second_derivative

__all__ = [
    "Audit",
    "Memory",
    "Use",
    "last_product",
    "memory_of",
    "one_at_a_time",
    "used_by_loss",
    "without_second_derivative",
]
