"""One node of each kind whose attributes the library reads, made of tiny tensors, with what it must have saved.

``layers`` has products and layers, ``entries`` the nodes that move, take, put or reduce entries, and ``losses`` those that end in
a scalar. Importing this package registers them all.
"""

from torch_secorder.autograd.node_examples import entries, layers, losses
from torch_secorder.autograd.node_examples.registry import EXAMPLES, numbers

__all__ = ["EXAMPLES", "entries", "layers", "losses", "numbers"]
