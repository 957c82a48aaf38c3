r"""Likelihoods: the distribution of labels that a loss type stands for, and output gradients whose squares sum to the Fisher.

For outputs f_n and a likelihood p(y | f_n), the Fisher is ``c sum_n J_n^T A_n J_n`` with A_n the curvature of
``-log p`` in f. A likelihood returns gradients s for the outputs, to be sent back through the model one after the other.
They are square roots of that curvature: ``sum_s s s^T = A_n`` if they are exact, ``E[sum_s s s^T] = A_n`` if they are
sampled. So the part of sample n in the trace is the sum of ``||J_n^T s||^2`` over them, or its expectation.
"""

from torch_secorder.likelihoods.categorical import Categorical
from torch_secorder.likelihoods.elementwise import ELEMENTWISE, Elementwise
from torch_secorder.likelihoods.loss_types import (
    LOSS_TYPES,
    axis_of_classes,
    likelihood,
    require_loss_of,
    warn_of_probabilities,
)
from torch_secorder.likelihoods.output_gradients import LastLayer, Likelihood, random_signs

__all__ = [
    "ELEMENTWISE",
    "LOSS_TYPES",
    "Categorical",
    "Elementwise",
    "LastLayer",
    "Likelihood",
    "axis_of_classes",
    "likelihood",
    "random_signs",
    "require_loss_of",
    "warn_of_probabilities",
]
