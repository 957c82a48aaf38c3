"""Small models, as data: every layer with every setting, every way of using it.

All must come out exact; `AWKWARD` ones need the autograd graph, and `fisher_report` may refuse those that say so.
"""

from problems._base import Problem, Setting
from problems.awkward import awkward
from problems.convolutions import convolutions, transposed_convolutions
from problems.layers import activations_and_bilinear, embeddings, linear, norms
from problems.sharing import shared
from problems.uses import uses

__all__ = ["AWKWARD", "BY_NAME", "PROBLEMS", "Problem", "Setting"]

PROBLEMS: list[Problem] = [
    *linear(),
    *convolutions(),
    *transposed_convolutions(),
    *embeddings(),
    *norms(),
    *activations_and_bilinear(),
    *shared(),
    *uses(),
]
BY_NAME = {problem.name: problem for problem in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems of one name"
AWKWARD: list[Problem] = list(awkward())
