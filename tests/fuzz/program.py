"""A case as a program that runs without the fuzzer."""

from __future__ import annotations

import inspect
import re
import textwrap

from fuzz import comparison, losses, model, truth, ways
from fuzz.case import Case
from fuzz.registry import HEADS, LOSSES, PIECES, STEMS, Entry

IMPORTS = """from __future__ import annotations

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_results, generalized_fisher_trace
from torch_secorder.pruning import Gates

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
"""


def program(case: Case) -> str:
    """Source text that builds the case from copies of its pieces, and raises what the case raises."""
    entries = [PIECES[step.piece] for step in case.steps] + [STEMS[case.stem], HEADS[case.head], LOSSES[case.loss]]
    copied = "\n".join(dict.fromkeys(source(entry) for entry in entries))
    return f"{IMPORTS}\n{_foundation(copied)}\n{copied}\n{_main(case)}"


def source(entry: Entry) -> str:
    """A registered function without its decorator."""
    return re.sub(r"^@\w+\(.*\)\n", "", textwrap.dedent(inspect.getsource(entry.make)))


def _foundation(copied: str) -> str:
    """The fuzzer's own files that everything rests on, as one."""
    text = "\n".join(_without_imports(inspect.getsource(file)) for file in (model, comparison, truth, ways))
    text = text.replace("truth.", "")
    from fuzz.pieces import routing

    needed = [losses.logits, losses.tokens, losses.weights]
    if "sorted_by" in copied:
        needed.append(routing.sorted_by)
    return "\n".join([text, "Both = tuple", *(inspect.getsource(function) for function in needed)])


def _without_imports(text: str) -> str:
    text = re.sub(r'\A""".*?"""\n', "", text, flags=re.DOTALL)
    text = re.sub(r"^(from|import) .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^@way\(.*\)\n", "", text, flags=re.MULTILINE)


def _main(case: Case) -> str:
    parts = "\n".join(f"parts.append(built({step.piece}, {step.number!r}, parts))" for step in case.steps)
    around = [step.around for step in case.steps]
    dtype = "torch.float64" if case.dtype == "float64" else "torch.float32"
    return f'''
def number(*parts):
    return random.Random("/".join(map(str, parts))).randrange(2**31)


def built(make, which, earlier=()):
    torch.manual_seed(number({case.seed}, which))
    return make(Site(f"{case.seed}/{{which}}", {case.width}, {case.places}, earlier))


def whole():
    parts = []
{textwrap.indent(parts, "    ")}
    model = Model(built(_stem, "stem"), parts, {around}, built(_head, "head"), {case.sequence_first})
    model.to({dtype}).train({not case.evaluates})
    r = random.Random("frozen {case.seed}")
    for name, p in model.named_parameters():
        if not name.startswith("head"):
            p.requires_grad_(r.random() >= {case.frozen})
    return model


_stem, _head = {case.stem}, {case.head}
{_data(case)}
torch.manual_seed({case.seed % 2**31})
problem = Problem(whole(), whole(), batches, {case.loss}, {case.reduction!r}, {case.dtype!r}, {case.updates}, {case.coupled},
                  {LOSSES[case.loss].coupled}, {int(case.sequence_first)}, {case.options!r})
for run in ({", ".join(case.ways)},):
    run(problem)
    problem.model.zero_grad()
'''


def _data(case: Case) -> str:
    """The batches as numbers, so that the program doesn't depend on how they were drawn."""
    lines = ["batches = ["]
    dtype = "torch.float64" if case.dtype == "float64" else "torch.float32"
    for x, y in case.batches():
        lines.append(f"    (torch.tensor({x.tolist()}, dtype={dtype}), torch.tensor({y.tolist()})),")
    return "\n".join([*lines, "]"])
