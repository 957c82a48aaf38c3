"""Real architectures, per parameter, against plain autograd on one sample after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not (find_spec("transformers") and find_spec("peft")):  # an import would take seconds in each of several processes
    pytest.skip("transformers and peft are not installed", allow_module_level=True)

from expectations import expectation
from models import BY_NAME, CASES, Case, at_full_width, main_output, outcome, reference
from oracles import assert_equal, call, total, trace
from supported_models import rows
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch's legacy weight_norm and others, about themselves
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
PAGE = Path(__file__).parents[1] / "docs/concepts/supported_models.rst"


def ways_of_cases() -> Iterator[Any]:
    """A monitor in float64, and a report in float32, where its check must not take rounding for a mistake."""
    for case in CASES:
        for way, dtype in {"monitor": torch.float64, "report": torch.float32}.items():
            dtype = dtype if dtype in case.dtypes else case.dtypes[0]
            yield pytest.param(case, dtype, way, id=f"{case}-{way}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("case", "dtype", "way"), list(ways_of_cases()))
def test_a_model(case: Case, dtype: torch.dtype, way: str) -> None:
    found = outcome(case, way, dtype)
    if way in case.refusals:
        assert re.search(case.refusals[way], found.refusal), found.refusal or "not refused"
    else:
        assert not found.refusal
        assert not found.wrong


BY_FUNCTION = [  # the functions have no batch_axis, nor any other option
    case for case in CASES if torch.float64 in case.dtypes and not case.options and not case.batch_axis
]


@pytest.mark.parametrize("case", BY_FUNCTION, ids=str)
def test_the_functions_give_a_models_total(case: Case) -> None:
    """The first function runs what the report of each model runs, and is tried with every eighth."""
    setting, expected = reference(case, torch.float64)
    right = total(expected)
    if case in BY_FUNCTION[::8]:
        with expectation(case.refusals.get("report", "")), at_full_width(torch.float64):
            value = empirical_fisher_trace(setting.model, setting.loss_fn, setting.inputs, setting.targets)
            assert_equal(value, right, right)
    with expectation(case.refusals.get("report", "")), at_full_width(torch.float64):
        outputs = main_output(call(setting.model, setting.inputs))
        if case.classes:  # the loss averages over positions, and a log-likelihood is their sum
            factor, kind, outputs = 1 / setting.targets[0].numel(), "nll", outputs.movedim(-1, 1)
        else:  # the loss is twice a Gaussian's
            factor, kind = 2, "mse"
        value = generalized_fisher_trace(setting.model, outputs, setting.targets, kind, labels="observed")
        assert_equal(factor**2 * value, right, right)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-square", "llama", "bert", "bert-square", "t5"])
def test_a_model_that_computes_its_own_loss(name: str) -> None:
    setting = BY_NAME[name].setting()
    model = setting.model
    inputs = dict(setting.inputs) | {"labels": setting.targets}
    named = dict(model.named_parameters())
    squared = []
    with at_full_width(torch.float64):
        for n in range(setting.n):
            loss = call(model, {key: value[n : n + 1] for key, value in inputs.items()}).loss
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            squared.append([0.0 if g is None else float(g.square().sum()) for g in grads])
        with FisherMonitor(model) as monitor:
            call(model, inputs).loss.backward()
    expected = trace(dict(zip(named, torch.tensor(squared, dtype=torch.float64).T, strict=True)))
    for key, value in expected.items():
        found = torch.tensor(monitor.report().loc[key, "fisher_trace"])
        assert_equal(found, value, total(expected), torch.float64)


# Some of these models have axes as long as their batch.
UNPLACED = r"shapes leave open where its \d samples are, and what shows it is hidden, by re-entrant activation"
# T5 computes its position bias, which has no batch axis, inside of its first block.
UNREADABLE = r"relative_attention_bias': used by \w+ inside of activation checkpointing"

CHECKPOINTED = {  # what a monitor says of each, without re-entrance and with it
    "gpt2": ("", UNPLACED),
    "gpt2-square": ("", UNPLACED),
    "llama": ("", ""),
    "bert": ("", UNPLACED),
    "t5": (UNREADABLE, UNPLACED),
    "vit": ("", UNPLACED),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-re-entrant", "re-entrant"])
@pytest.mark.parametrize(("name", "refusals"), CHECKPOINTED.items(), ids=list(CHECKPOINTED))
def test_a_checkpointed_model(name: str, refusals: tuple[str, str], use_reentrant: bool) -> None:
    """Trap 9 at real code."""
    setting = BY_NAME[name].setting(torch.float32)
    expected = trace(setting.squared_norms())
    setting.model.train()  # there is no dropout in effect other than BERT's and ViT's, which are switched off
    for module in setting.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    setting.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with expectation(refusals[use_reentrant]):
        with FisherMonitor(setting.model) as monitor:
            setting.loss().backward()
        for key, value in expected.items():
            found = torch.tensor(monitor.report().loc[key, "fisher_trace"])
            assert_equal(found, value, total(expected), torch.float32)


def test_the_page_names_every_architecture() -> None:
    """`python tests/supported_models.py` writes it."""
    page = PAGE.read_text()
    for architecture, _ in rows():
        assert f"* - {architecture}\n" in page
