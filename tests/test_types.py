"""A type checker sees which values arguments may have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import torch_secorder
from torch_secorder import FisherMonitor, arguments, fisher_report, fisher_results, generalized_fisher_trace
from torch_secorder.approximations.fisher_report import ReportOptions
from torch_secorder.approximations.report_arguments import ReportArguments
from torch_secorder.errors import CurvatureError
from torch_secorder.integrations.peft import rank_pattern
from torch_secorder.losses import causal_lm
from torch_secorder.noise_scale import gradient_noise_scale
from torch_secorder.pruning import Gates, prune, weight_saliency
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, rounded
from torch_secorder.testing import check, sample_gradients

SNIPPET = """\
from torch import Tensor, nn
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, fisher_results, generalized_fisher_trace
from torch_secorder.integrations.peft import rank_pattern
from torch_secorder.losses import causal_lm
from torch_secorder.noise_scale import gradient_noise_scale
from torch_secorder.pruning import Gates, prune, weight_saliency
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, rounded
from torch_secorder.testing import check, sample_gradients

def right(model: nn.Module, x: Tensor) -> None:
    report = fisher_report(model, None, (x, None), fisher="exact", loss_type="mse", reduction="sum", by="module")
    with FisherMonitor(model, "sum", nonfinite="skip", repeated_calls="same", fisher="sampled") as monitor:
        generalized_fisher_trace(model, x, None, "poisson", labels="model")
    monitor.report(lambda name: name[0])
    gradient_noise_scale(report, by="model")
    fisher_results(model, "model", {"x": x}, rtol=0.1, rtol_of="rows", diagonal={"*": "full", "*.weight": "rows"}, device="cpu")
    check(model, causal_lm("sequence"), (x, x), labels="labels", parameters=["*.weight"], batch_axis=1)
    Gates(model, {"*": {"side": "input", "groups": 4}})
    weight_saliency(model, report, parameters=lambda name: True)
    allocate_bits(quantization_sensitivity(model, report), 100, unit="bytes")

def wrong(model: nn.Module, x: Tensor) -> None:
    fisher_report(model, None, (x, None), fisher="exakt")
    fisher_report(model, None, (x, None), loss_type="ce")
    fisher_report(model, None, (x, None), reduction="none")
    report = fisher_report(model, None, (x, None), by="layer")
    FisherMonitor(model, "average")
    FisherMonitor(model, nonfinite="ignore")
    FisherMonitor(model, on_refusal="warn")
    FisherMonitor(model, repeated_calls="all")
    FisherMonitor(model, fisher="exact")
    FisherMonitor(model).report("layer")
    FisherMonitor(model).summary("layer")
    generalized_fisher_trace(model, x, None, "ce")
    generalized_fisher_trace(model, x, None, labels="mine")
    gradient_noise_scale(report, by="layer")
    Gates(model, reduction="average")
    quantization_sensitivity(model, report, scheme="asymmetric")
    quantization_sensitivity(model, report, per="row")
    quantization_sensitivity(model, report, parameters="biases")
    weight_saliency(model, report, parameters="biases")
    prune(model, {}, 0.5, scope="model")
    allocate_bits(report, 4, unit="MB")
    rank_pattern(report, 4, unit="ranks")
    rounded(x, 4, "asymmetric")
    rounded(x, 4, per="row")
    quantized(model, 4, per="row")
    causal_lm("token")
    fisher_report(model, "modell", (x, None))
    fisher_report(model, None, (x, None), rtol_of="row")
    fisher_results(model, None, (x, None), fisher="exakt")
    fisher_results(model, None, (x, None), rtol_of="row")
    fisher_results(model, None, (x, None), reduction="none")
    check(model, "modell", (x, None))
    check(model, "model", (x, None), loss_type="ce")
    empirical_fisher_trace(model, "modell", x, x)
    sample_gradients(model, "model", x, x, reduction="average")
    FisherMonitor(model, diagonal={"*": "diagonal"})
    fisher_results(model, None, (x, None), diagonal={"*": "diagonal"})
    Gates(model, {"*": {"side": "inputs"}})
    fisher_results(model, None, (x, None), fischer="exact")
    check(model, "model", (x, None), fischer="exact")
"""

FOREIGN = ["torch", "pandas", "numpy", "scipy", "transformers", "lightning", "pytorch_lightning", "peft", "matplotlib"]


@pytest.mark.slow
def test_mypy_finds_values_that_are_none_of_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    # Of the arguments in question none has a type of these packages, which take most of the time.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in FOREIGN)
    )
    monkeypatch.setenv("MYPYPATH", str(Path(torch_secorder.__file__).parents[1]))
    options = [
        f"--cache-dir={Path(__file__).parents[1] / '.mypy_cache' / 'snippet'}",  # A later run reads again what changed.
        "--follow-imports=silent",
        f"--config-file={tmp_path / 'mypy.ini'}",
        "--ignore-missing-imports",
    ]
    told, error, _ = api.run([*options, str(tmp_path / "snippet.py")])
    assert not error
    words = r'(?:expected|has type) .*Literal|did you mean "fisher"'
    found = {int(line) for line in re.findall(rf"snippet\.py:(\d+): error: .*(?:{words})", told)}
    lines = SNIPPET.splitlines()
    begin = lines.index(next(line for line in lines if "def wrong" in line)) + 2
    assert found == set(range(begin, len(lines) + 1)), told


def test_reports_that_hand_on_their_arguments_have_those_of_the_report() -> None:
    signature = inspect.signature(fisher_report, eval_str=False)
    optional = {name: p.annotation for name, p in signature.parameters.items() if p.default is not p.empty}
    optional.pop("by")
    assert optional.keys() == ReportArguments.__annotations__.keys()
    assert {name: str(hint) for name, hint in optional.items()} == {
        name: getattr(hint, "__forward_arg__", hint) for name, hint in ReportArguments.__annotations__.items()
    }
    assert {one.name for one in fields(ReportOptions)} - {"keeps", "ids"} == optional.keys()


MODEL = nn.Sequential(nn.Linear(4, 3))
X = torch.zeros(2, 4)
DATA = [(X, None)]
REPORT = fisher_report(MODEL, None, DATA, fisher="exact", progress=False)
with FisherMonitor(MODEL) as _monitor:
    MODEL(X + 1).sum().backward()
GRADIENTS = _monitor.report()
SENSITIVITY = quantization_sensitivity(MODEL, REPORT)

# A call with a value that is none of the choices, and the choices.
NONSENSE: dict[str, tuple[Callable[[Any], object], object]] = {
    "FisherMonitor(reduction=)": (lambda word: FisherMonitor(MODEL, word), arguments.Reduction),
    "FisherMonitor(nonfinite=)": (lambda word: FisherMonitor(MODEL, nonfinite=word), arguments.OnError),
    "FisherMonitor(on_refusal=)": (lambda word: FisherMonitor(MODEL, on_refusal=word), arguments.OnError),
    "FisherMonitor(repeated_calls=)": (lambda word: FisherMonitor(MODEL, repeated_calls=word), arguments.RepeatedCalls),
    "FisherMonitor(fisher=)": (lambda word: FisherMonitor(MODEL, fisher=word), arguments.MonitorFisher),
    "FisherMonitor(diagonal=)": (lambda word: FisherMonitor(MODEL, diagonal={"*": word}), arguments.DiagonalSums),
    "fisher_report(fisher=)": (lambda word: fisher_report(MODEL, None, DATA, fisher=word), arguments.Fisher),
    "fisher_report(loss_type=)": (
        lambda word: fisher_report(MODEL, None, DATA, fisher="exact", loss_type=word),
        arguments.LossType,
    ),
    "fisher_report(reduction=)": (lambda word: fisher_report(MODEL, None, DATA, reduction=word), arguments.Reduction),
    "fisher_report(rtol_of=)": (lambda word: fisher_report(MODEL, None, DATA, rtol_of=word), arguments.ErrorOf),
    "fisher_results(fisher=)": (lambda word: fisher_results(MODEL, None, DATA, fisher=word), arguments.Fisher),
    "generalized_fisher_trace(loss_type=)": (
        lambda word: generalized_fisher_trace(MODEL, MODEL(X), None, word),
        arguments.LossType,
    ),
    "generalized_fisher_trace(labels=)": (
        lambda word: generalized_fisher_trace(MODEL, MODEL(X), None, labels=word),
        arguments.Labels,
    ),
    "generalized_fisher_trace(reduction=)": (
        lambda word: generalized_fisher_trace(MODEL, MODEL(X), None, reduction=word),
        arguments.Reduction,
    ),
    "report(by=)": (
        lambda word: fisher_report(MODEL, None, DATA, fisher="exact", by=word, progress=False),
        ("module", "type"),
    ),
    "gradient_noise_scale(by=)": (lambda word: gradient_noise_scale(GRADIENTS, by=word), ("module", "type", "model")),
    "Gates(reduction=)": (lambda word: Gates(MODEL, reduction=word), arguments.Reduction),
    "Gates(fisher=)": (lambda word: Gates(MODEL, fisher=word), arguments.MonitorFisher),
    "Gates(side=)": (lambda word: Gates(MODEL, {"*": {"side": word}}), arguments.Side),
    "prune(scope=)": (lambda word: prune(MODEL, weight_saliency(MODEL, REPORT), 0.5, scope=word), arguments.Scope),
    "weight_saliency(parameters=)": (lambda word: weight_saliency(MODEL, REPORT, parameters=word), ("weights", "all")),
    "weight_saliency(fisher=)": (lambda word: weight_saliency(MODEL, REPORT, fisher=word), arguments.Fisher),
    "quantization_sensitivity(parameters=)": (
        lambda word: quantization_sensitivity(MODEL, REPORT, parameters=word),
        ("weights", "all"),
    ),
    "quantization_sensitivity(scheme=)": (
        lambda word: quantization_sensitivity(MODEL, REPORT, scheme=word),
        arguments.Scheme,
    ),
    "quantization_sensitivity(per=)": (lambda word: quantization_sensitivity(MODEL, REPORT, per=word), arguments.Grain),
    "rounded(scheme=)": (lambda word: rounded(X, 4, word), arguments.Scheme),
    "rounded(per=)": (lambda word: rounded(X, 4, per=word), arguments.Grain),
    "quantized(scheme=)": (lambda word: quantized(MODEL, 4, word).__enter__(), arguments.Scheme),
    "allocate_bits(unit=)": (lambda word: allocate_bits(SENSITIVITY, 4, unit=word), arguments.BudgetUnit),
    "rank_pattern(unit=)": (lambda word: rank_pattern(REPORT, 4, unit=word), arguments.RankUnit),
    "causal_lm(per=)": (causal_lm, arguments.LossMean),
    "sample_gradients(reduction=)": (
        lambda word: sample_gradients(MODEL, nn.MSELoss(), X, torch.zeros(2, 3), reduction=word),
        arguments.Reduction,
    ),
    "check(fisher=)": (lambda word: check(MODEL, nn.MSELoss(), (X, torch.zeros(2, 3)), fisher=word), arguments.Fisher),
    "check(loss_fn=)": (lambda word: check(MODEL, word, (X, None)), ("model",)),
    "fisher_report(loss_fn=)": (lambda word: fisher_report(MODEL, word, DATA), ("model",)),
}


@pytest.mark.parametrize(("call", "choices"), NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("word", ["nonsense", ["mean"]], ids=["a word", "a list"])
def test_a_value_that_is_none_of_the_choices_is_told_them(
    call: Callable[[Any], object], choices: object, word: Any
) -> None:
    with pytest.raises(CurvatureError) as told:
        call(word)
    expected = choices if isinstance(choices, tuple) else get_args(choices)
    assert all(repr(choice) in str(told.value).replace('"', "'") for choice in expected), str(told.value)
    assert str(word) in str(told.value)
