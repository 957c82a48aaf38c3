"""One node of each kind whose attributes the library reads, made of tiny tensors, with what it must have saved.

``layers`` has products and layers, and ``entries`` the nodes that move, take, put or reduce entries. Importing this package
registers them all.
"""

from torch_secorder.autograd.node_examples import entries, layers
from torch_secorder.autograd.node_examples.registry import EXAMPLES, numbers

__all__ = ["EXAMPLES", "entries", "layers", "numbers"]
