"""How sensitive a PyTorch model is to each of its parameters, by the exact trace of the Fisher information."""

from torch_secorder.approximations.fisher_report import fisher_report, fisher_results
from torch_secorder.approximations.fisher_trace import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.approximations.hessian_trace import hessian_trace
from torch_secorder.monitor import FisherMonitor
from torch_secorder.rules import register_rule
from torch_secorder.version import VERSION

__all__ = [
    "FisherMonitor",
    "empirical_fisher_trace",
    "fisher_report",
    "fisher_results",
    "generalized_fisher_trace",
    "hessian_trace",
    "register_rule",
]
__version__ = VERSION
