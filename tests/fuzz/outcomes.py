"""What a case comes to, and how it is made smaller while it comes to the same."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import torch_secorder
from fuzz import truth
from fuzz.case import Case
from fuzz.comparison import Wrong
from fuzz.registry import LOSSES, WAYS
from fuzz.ways import Problem
from torch_secorder.errors import CurvatureError

FROZEN = (  # what a monitor says of frozen parameters, where its graph shows nothing of them
    "no exact rule for the frozen parameters",
    "a frozen parameter is used outside of its module's forward",
    "frozen, in a layer that has no batch axis",
)
HIDDEN = (  # what is said of a re-entrant checkpoint in a run of the user's own, whose graph nobody can see
    "by re-entrant activation checkpointing (use torch.utils.checkpoint with use_reentrant=False",
    "re-entrant or selective activation checkpointing (context_fn=)",
)
UNSEEN = (
    "on what other layers computed from parameters alone, where nothing has the gradient of each sample"  # of gates
)
SILENT = "of which one has a zero gradient now"  # of a trace that is to be differentiated
FAILURES = ("wrong", "crashed", "inconsistent")  # The command fails for these.


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    `kind` is "exact"; "wrong", NaN among it; "refused", though exact was possible; "coupled", refused as it should be;
    "hidden", refused since the docs say that re-entrant checkpoints of the user's own run hide their graph;
    "frozen", refused since the docs say that frozen parameters are where no layer's rule sees them (with `parameters="all"`);
    "unseen", refused since the docs say that gates are where samples pass, or that a use behind a closed gate has no derivative;
    "crashed", by an exception that isn't the library's; "inconsistent", if the fuzzer is at fault;
    "rounded", if plain autograd's own numbers are as far off where inputs and parameters change by their rounding;
    or "impossible", if torch itself can't run the case.
    """

    kind: str
    way: str = ""
    detail: str = ""
    place: str = ""  # where a foreign exception came from

    @property
    def cause(self) -> str:
        """What has to stay the same while the case is made smaller."""
        return f"{self.kind} {self.place}"


def problem_of(case: Case) -> Problem:
    """The case's model, twin, batches and loss."""
    model, twin = (case.model().to(case.device) for _ in range(2))
    batches = [(x.to(case.device), y.to(case.device)) for x, y in case.batches()]
    return Problem(
        *(model, twin, batches, LOSSES[case.loss].make, case.reduction, case.dtype, case.updates),
        *(case.coupled, LOSSES[case.loss].coupled, int(case.sequence_first), case.options),
    )


def outcome(case: Case) -> Outcome:
    """Runs a case by all its ways, up to the first that isn't exact."""
    torch.manual_seed(case.seed % 2**31)
    name = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = problem_of(case)
            with _by_default(case.device):
                if why := _impossible(problem):
                    return Outcome("impossible", "", why)
                for name in case.ways:
                    WAYS[name].make(problem)
                    problem.model.zero_grad()
                    for p, q in zip(problem.model.parameters(), problem.twin.parameters(), strict=True):
                        q.requires_grad_(p.requires_grad)
    except Wrong as error:
        kind = "rounded" if _is_rounding(problem, error) else type(error).__name__.lower()
        return Outcome(kind, name, str(error))
    except CurvatureError as error:
        return Outcome(
            _kind_of_refusal(case, name, str(error)), name, f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
    except Exception as error:
        return Outcome("crashed", name, f"{type(error).__name__}: {' '.join(str(error).split())}", _place(error))
    return Outcome("exact")


def _by_default(device: str) -> AbstractContextManager[Any]:
    """The device as the default; of a CPU nobody has to be told."""
    return nullcontext() if device == "cpu" else torch.device(device)


def _kind_of_refusal(case: Case, way: str, text: str) -> str:
    """Which refusals are right: in the ways that run the model themselves, nothing is hidden."""
    if case.coupled:
        return "coupled"
    if any(words in text for words in FROZEN):
        return "frozen"
    if way in ("monitor", "exact", "sums", "gates") and any(words in text for words in HIDDEN):
        return "hidden"
    return "unseen" if (way, True) in (("gates", UNSEEN in text), ("differentiated", SILENT in text)) else "refused"


def _impossible(problem: Problem) -> str:
    """What torch raises for the case without the library, if it does."""
    try:
        for x, y in problem.batches:
            problem.scalar(truth.running(problem.twin, x, problem.dtype), y).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    problem.twin.zero_grad()
    return ""


# A change of what comes in by one rounding is one of the dozens that a model makes from its input to its gradients.
ROUNDINGS = 100


def _is_rounding(problem: Problem, error: Wrong) -> bool:
    """Whether the wrong numbers are as near to the right ones as rounding lets plain autograd know these."""
    try:
        return error.off <= ROUNDINGS * problem.spread()
    except RuntimeError:  # Plain autograd can't run the model after what the failed way left of it.
        return False


def _place(error: Exception) -> str:
    """The last line of the library that an exception went through, or of the fuzzer."""
    root = str(Path(torch_secorder.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(root)]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    for name in case.ways if len(case.ways) > 1 else ():
        yield replace(case, ways=tuple(other for other in case.ways if other != name))
    for i in range(len(case.steps)):
        yield replace(case, steps=case.steps[:i] + case.steps[i + 1 :])
    for i in range(len(case.sizes) if len(case.sizes) > 1 else 0):
        yield replace(case, sizes=case.sizes[:i] + case.sizes[i + 1 :])
    for i, step in enumerate(case.steps):
        if step.around:
            yield replace(case, steps=(*case.steps[:i], replace(step, around=False), *case.steps[i + 1 :]))
    yield from _plainer(case)


def _plainer(case: Case) -> Iterator[Case]:
    usual = {"data": "normal", "dtype": "float64", "frozen": 0.0, "updates": False, "evaluates": False, "stem": "plain"}
    yield from (replace(case, **{k: v}) for k, v in usual.items() if getattr(case, k) != v)
    if case.sequence_first:
        yield replace(case, sequence_first=False)
    plain = {"diagonal": False, "per_sample": False, "activations": False, "parameters": "trainable", "loss_scale": 1.0}
    for name, value in {**plain, "max_memory": None}.items():
        if case.options[name] != value:
            yield replace(case, options={**case.options, name: value})
    reads = LOSSES[case.loss].needs
    loss, head = ("mean_of_samples", "mean_of_places") if reads == "pooled" else ("mean_of_places", "every_place")
    if case.loss != loss and not LOSSES[case.loss].coupled:
        yield replace(case, loss=loss)
    if case.head != head:
        yield replace(case, head=head)


def shrunk(case: Case) -> tuple[Case, Outcome]:
    """The smallest case found with the same outcome from the same place."""
    found = outcome(case)
    again = found.kind != "exact"
    while again:
        again = False
        for candidate in smaller(case):
            other = outcome(candidate)
            if other.cause == found.cause and _kind_of_error(other) == _kind_of_error(found):
                case, found, again = candidate, other, True
                break
    return case, found


def _kind_of_error(found: Outcome) -> str:
    return found.detail.split(":")[0] if found.kind not in ("wrong", "inconsistent", "rounded") else ""
