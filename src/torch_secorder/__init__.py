"""How much curvature (Fisher information) every parameter of a PyTorch model carries."""

from torch_secorder.approximations.fisher_trace import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.approximations.hessian_trace import hessian_trace
from torch_secorder.loop import fisher_report
from torch_secorder.monitor import FisherMonitor
from torch_secorder.rules import register_rule

__all__ = [
    "FisherMonitor",
    "empirical_fisher_trace",
    "fisher_report",
    "generalized_fisher_trace",
    "hessian_trace",
    "register_rule",
]
__version__ = "0.1.0"
