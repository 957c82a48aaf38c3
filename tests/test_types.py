"""A type checker sees which values arguments may have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torch_secorder

SNIPPET = """\
from torch import Tensor, nn
from torch_secorder import FisherMonitor, fisher_report, generalized_fisher_trace
from torch_secorder.noise_scale import gradient_noise_scale
from torch_secorder.pruning import Gates
from torch_secorder.quantization import quantization_sensitivity

def right(model: nn.Module, x: Tensor) -> None:
    report = fisher_report(model, None, (x, None), fisher="exact", loss_type="mse", reduction="sum", by="module")
    with FisherMonitor(model, "sum", nonfinite="skip", repeated_calls="same", fisher="sampled") as monitor:
        generalized_fisher_trace(model, x, None, "poisson", labels="model")
    monitor.report(lambda name: name[0])
    gradient_noise_scale(report, by="model")

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
"""


@pytest.mark.slow
def test_mypy_finds_values_that_are_none_of_the_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    monkeypatch.setenv("MYPYPATH", str(Path(torch_secorder.__file__).parents[1]))
    options = ["--no-incremental", "--follow-imports=silent", "--config-file=", "--ignore-missing-imports"]
    told, error, _ = api.run([*options, str(tmp_path / "snippet.py")])
    assert not error
    found = {int(line) for line in re.findall(r"snippet\.py:(\d+): error: Argument .* expected .*Literal", told)}
    lines = SNIPPET.splitlines()
    begin = lines.index(next(line for line in lines if "def wrong" in line)) + 2
    assert found == set(range(begin, len(lines) + 1)), told
