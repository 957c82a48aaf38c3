"""Small models, as data: every layer with every setting, every way of using it.

All must come out exact; `AWKWARD` ones need the autograd graph, and `fisher_report` may refuse those that say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from problems._base import Problem, Setting
from problems.awkward import awkward
from problems.convolutions import convolutions, transposed_convolutions
from problems.layers import activations_and_bilinear, embeddings, linear, norms
from problems.sharing import shared
from problems.uses import uses

__all__ = ["AWKWARD", "BY_NAME", "PROBLEMS", "Problem", "Setting", "every_problem", "of_problems", "repeats"]

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


def repeats(problem: Problem) -> bool:
    """Whether another problem goes the same way: a convolution along one axis or three, and its settings along two."""
    return re.match(r"conv(_transpose)?-[13]d-(?!plain)", problem.name) is not None


def of_problems(problems: Iterable[Problem]) -> pytest.MarkDecorator:
    """Parametrizes a test by problem."""
    return pytest.mark.parametrize("problem", list(problems), ids=str)


every_problem = of_problems(PROBLEMS)
