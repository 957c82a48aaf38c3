"""Parameters chosen by names, patterns or a function, in everything that analyzes, against a loop over samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model_state import assert_unchanged, state
from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    generalized_fisher_trace,
    hessian_trace,
)
from torch_secorder.errors import ArgumentError, CoverageError


def model() -> nn.Module:
    """The first layer is frozen."""
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    found = nn.Sequential(*layers).double()
    found[0].requires_grad_(False)
    return found


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


SELECTIONS: list[tuple[Any, list[str]]] = [
    ("trainable", ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]),
    ("3.weight", ["3.weight"]),
    ("*.bias", ["0.bias", "1.bias", "3.bias", "5.bias"]),
    (["5.*", "0.weight"], ["0.weight", "5.weight", "5.bias"]),
    (("5.*",), ["5.weight", "5.bias"]),
    (lambda name, p: p.dim() == 2 and p.requires_grad, ["3.weight", "5.weight"]),
]


@pytest.mark.parametrize(("selection", "names"), SELECTIONS)
def test_a_monitor_of_chosen_parameters(selection: Any, names: list[str]) -> None:
    one, (x, y) = model(), batch()
    expected = trace(per_sample_squared_norms(one, cross_entropy, x, y, parameters="all"))
    chosen = {name: expected[name] for name in names}
    with FisherMonitor(one, parameters=selection) as monitor:
        cross_entropy(one(x), y).backward()
    assert_rows(monitor.report(), chosen)
    assert_equal(monitor.trace, total(chosen), total(chosen))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("selection", "names"), SELECTIONS)
def test_a_report_of_chosen_parameters(selection: Any, names: list[str], verify: bool) -> None:
    """What is not chosen requires no gradient for the time, though layers in front of what is chosen are trained."""
    one, (x, y) = model(), batch()
    expected = trace(per_sample_squared_norms(one, cross_entropy, x, y, parameters="all"))
    before = state(one)
    report = fisher_report(one, cross_entropy, (x, y), parameters=selection, progress=False, verify=verify)
    assert_unchanged(before, one)
    assert_rows(report, {name: expected[name] for name in names})
    exact = fisher_report(one, None, (x, None), fisher="exact", parameters=selection, progress=False, verify=verify)
    found = trace(exact_fisher(one, x, parameters="all"))
    assert_rows(exact, {name: found[name] for name in names})


def assert_rows(report: Any, expected: dict[str, Tensor]) -> None:
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


def test_the_functions_of_chosen_parameters() -> None:
    one, (x, y) = model(), batch()
    expected = trace(per_sample_squared_norms(one, cross_entropy, x, y, parameters="all"))
    value = empirical_fisher_trace(one, cross_entropy, x, y, parameters="*.bias")
    assert_equal(value, sum(t for name, t in expected.items() if name.endswith("bias")), total(expected))
    fisher = trace(exact_fisher(one, x, parameters="all"))
    value = generalized_fisher_trace(one, one(x), None, parameters=["3.*"])
    assert_equal(value, fisher["3.weight"] + fisher["3.bias"], total(fisher))
    with pytest.raises(CoverageError, match=r"parameters 0.weight, 0.bias: frozen.*use fisher_report"):
        generalized_fisher_trace(one, one(x), None, parameters=["0.*", "3.*"])


def test_the_trace_of_chosen_parameters_differentiated_in_all() -> None:
    """What isn't chosen keeps its gradient where the result is differentiated, maybe in it."""
    one, (x, y) = model(), batch()
    value = empirical_fisher_trace(one, cross_entropy, x, y, create_graph=True, parameters="5.bias")
    slope = torch.autograd.grad(value, one[3].weight)[0]
    residuals = torch.stack(
        [
            torch.autograd.grad(cross_entropy(one(x[n : n + 1]), y[n : n + 1]), one[5].bias, create_graph=True)[0]
            for n in range(5)
        ]
    )
    right = torch.autograd.grad(residuals.square().sum() / 5, one[3].weight)[0]
    torch.testing.assert_close(slope, right)


@pytest.mark.slow
def test_the_hessian_of_chosen_parameters() -> None:
    one, (x, y) = model(), batch()

    def loss(bias: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(one, {"0.bias": bias}, (x,)), y)

    right = float(torch.autograd.functional.hessian(loss, one[0].bias.detach()).trace())  # type: ignore[no-untyped-call]
    before = state(one)
    table = hessian_trace(
        one, cross_entropy, x, y, 2000, parameters="0.bias", generator=torch.Generator().manual_seed(0)
    )
    assert_unchanged(before, one)
    assert list(table.index) == ["0.bias"]
    assert abs(table.hessian_trace["0.bias"] - right) < 4 * table.hessian_trace_stderr["0.bias"] + 1e-12


def test_tied_parameters_go_by_each_of_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids).mean(1).tanh())

    one, ids, y = Tied().double(), torch.randint(7, (4, 3)), torch.randint(7, (4,))
    expected = trace(per_sample_squared_norms(one, cross_entropy, ids, y))
    report = fisher_report(one, cross_entropy, (ids, y), parameters="head.weight", progress=False)
    assert list(report.index) == ["embedding.weight"]
    assert report.fisher_trace["embedding.weight"] == pytest.approx(float(expected["embedding.weight"]), rel=1e-8)


def test_a_monitor_of_chosen_parameters_goes_on_from_a_file(tmp_path: Path) -> None:
    one, (x, y) = model(), batch()
    with FisherMonitor(one, parameters=["5.*", "0.weight"]) as monitor:
        cross_entropy(one(x), y).backward()
    monitor.save(tmp_path / "chosen.safetensors")
    again = FisherMonitor.load(tmp_path / "chosen.safetensors", one)
    with again:
        cross_entropy(one(x), y).backward()
    assert again.n_samples == 10
    assert_rows(
        again.report(),
        {name: torch.tensor(t, dtype=torch.float64) for name, t in monitor.report().fisher_trace.items()},
    )


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("weights", r"no parameter that matches 'weights'; the nearest are .*patterns match whole names"),
        (["5.*", "7.weight"], r"no parameter that matches '7.weight'; the nearest are \d.weight"),
        ([], "selects none of the 8 parameters of Sequential"),
        (lambda name, p: False, "selects none of the 8 parameters of Sequential"),
        (["5.*", 3], r"must be \"trainable\", \"all\", names or patterns"),
        (None, r"must be \"trainable\", \"all\", names or patterns"),
        (3, r"must be \"trainable\", \"all\", names or patterns"),
    ],
)
def test_nonsense(selection: Any, message: str) -> None:
    for ask in (
        lambda: FisherMonitor(model(), parameters=selection),
        lambda: fisher_report(model(), cross_entropy, batch(), parameters=selection, progress=False),
        lambda: empirical_fisher_trace(model(), cross_entropy, *batch(), parameters=selection),
    ):
        with pytest.raises(ArgumentError, match=message):
            ask()
