"""Approximations of a loss's curvature."""

from torch_secorder.approximations.fisher_trace import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.approximations.hessian_trace import hessian_trace

__all__ = ["empirical_fisher_trace", "generalized_fisher_trace", "hessian_trace"]
