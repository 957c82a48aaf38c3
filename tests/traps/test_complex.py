"""Trap 29, complex numbers: the trace of a complex parameter is that of its real and its imaginary part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from problems._base import Forward
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    fisher_results,
    generalized_fisher_trace,
    hessian_trace,
)
from torch_secorder.errors import UnsupportedError
from torch_secorder.pruning import weight_saliency
from traps.test_crashes import Holding

C = torch.complex128


def spectrum(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.fft.fft(m.l(x)).abs())


def half_spectrum(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.view_as_real(torch.fft.rfft(m.l(x))).flatten(1))


def weight_of_two_parts(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.view_as_real(x.to(C) @ torch.complex(m.a, m.b)).flatten(1))


def product(m: Any, x: Tensor) -> Tensor:
    return m.h(x) + (x.to(C) @ m.w).abs()


def filtered(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.fft.irfft(torch.fft.rfft(m.l(x)) * m.w, 6))


def modulus_of_a_parameter(m: Any, x: Tensor) -> Tensor:
    return m.h(x) * m.w.abs() + m.w.angle()


def summand_used_twice(m: Any, x: Tensor) -> Tensor:
    return m.h(((x.to(C) + m.w) * m.w.conj()).abs())


def layers(m: Any, x: Tensor) -> Tensor:
    return m.second(torch.tanh(m.first(x.to(C)))).abs()


def convolved(m: Any, x: Tensor) -> Tensor:
    return m.h(m.c(x[:, None].to(C)).abs().flatten(1))


def filter_made_by_a_layer(m: Any, x: Tensor) -> Tensor:
    """A kernel for all samples comes from a layer on positions, and meets the data as a spectrum."""
    kernel = m.k(torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]).T
    return m.h(torch.fft.irfft(torch.fft.rfft(m.l(x)) * torch.fft.rfft(kernel), 6))


def behind_a_closed_gate(m: Any, x: Tensor) -> Tensor:
    return m.h(x) + m.gate * torch.fft.irfft(torch.fft.rfft(x) * m.w, 4)[:, :3]


def small(*shape: int, dtype: torch.dtype = C) -> Tensor:
    return 0.5 * torch.randn(*shape, dtype=dtype)


def models() -> dict[str, nn.Module]:
    real, linear = {"dtype": torch.float64}, nn.Linear
    return {
        "spectrum": Forward(spectrum, l=linear(4, 6, **real), h=linear(6, 3, **real)),
        "half spectrum": Forward(half_spectrum, l=linear(4, 6, **real), h=linear(8, 3, **real)),
        "weight of two parts": Holding(
            weight_of_two_parts, parameters={"a": small(4, 3, **real), "b": small(4, 3, **real)}, h=linear(6, 3, **real)
        ),
        "product": Holding(product, parameters={"w": small(4, 3)}, h=linear(4, 3, **real)),
        "filter": Holding(filtered, parameters={"w": small(4)}, l=linear(4, 6, **real), h=linear(6, 3, **real)),
        "filter of a layer": Forward(
            filter_made_by_a_layer, l=linear(4, 6, **real), k=linear(1, 1, **real), h=linear(6, 3, **real)
        ),
        "modulus": Holding(modulus_of_a_parameter, parameters={"w": small(3)}, h=linear(4, 3, **real)),
        "used twice": Holding(summand_used_twice, parameters={"w": small(4)}, h=linear(4, 3, **real)),
        "closed gate": Holding(
            behind_a_closed_gate,
            parameters={"w": small(3), "gate": torch.zeros((), **real)},
            h=linear(4, 3, **real),
        ),
        "layers": Forward(layers, first=linear(4, 4, dtype=C), second=linear(4, 3, dtype=C)),
        "convolution": Forward(convolved, c=nn.Conv1d(1, 2, 3, dtype=C), h=linear(4, 3, **real)),
    }


def over_real_parts(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """``t_{n,p}`` from a loop, for a model whose complex parameters are put together from real ones."""
    leaves = {
        name: (torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    values = {
        name: torch.view_as_complex(leaves[name]) if p.is_complex() else leaves[name]
        for name, p in model.named_parameters()
    }
    rows = [
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        for loss in losses(torch.func.functional_call(model, values, (x,)))
    ]
    return {name: torch.stack([row[i].square().sum() for row in rows]) for i, name in enumerate(leaves)}


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("name", models())
def test_trap_29_complex_numbers(name: str, n: int) -> None:
    model, x, y = models()[name], torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))
    expected = over_real_parts(model, lambda outputs: F.cross_entropy(outputs, y, reduction="none"), x)
    everything = sum(t.mean() for t in expected.values())
    with FisherMonitor(model, per_sample=True, diagonal=True) as monitor:
        for _ in range(4):  # sums are checked in the first three passes, and small calls put together in later ones
            F.cross_entropy(model(x), y).backward()
    report = fisher_report(model, F.cross_entropy, (x, y), progress=False)["fisher_trace"]
    for parameter, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[parameter, "fisher_trace"]), t.mean(), everything)
        assert_equal(torch.tensor(report[parameter]), t.mean(), everything)
        assert_equal(torch.tensor(monitor.per_sample[parameter].to_numpy()), t.repeat(4), everything * n)
        diagonal = monitor.diagonal[parameter]
        assert diagonal.dtype == torch.float64 or not diagonal.any()  # zeros are as they were made
        assert diagonal.shape == model.get_parameter(parameter).shape
        assert_equal(diagonal.sum(), t.mean(), everything)
    assert_equal(empirical_fisher_trace(model, F.cross_entropy, x, y), everything, everything)


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
@pytest.mark.parametrize("name", models())
def test_trap_29_the_fisher_of_complex_parameters(name: str) -> None:
    model, x = models()[name], torch.randn(5, 4, dtype=torch.float64)
    found = [over_real_parts(model, lambda outputs, k=k: outputs[:, k], x) for k in range(3)]  # type: ignore[misc]
    expected = torch.stack([t for row in found for t in row.values()]).sum() / 5
    results = fisher_results(model, None, (x, None), fisher="exact", loss_type="mse", progress=False)
    assert_equal(results.trace, expected, expected, torch.float64)
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), expected, expected)


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_29_complex_outputs() -> None:
    def losses(outputs: Tensor) -> Tensor:
        return (outputs.imag - 1).square().sum(1) + outputs.abs().sum(1)

    model, x = nn.Sequential(nn.Linear(4, 4, dtype=C), nn.Linear(4, 3, dtype=C)), torch.randn(5, 4, dtype=C)
    expected = over_real_parts(model, losses, x)
    everything = sum(t.mean() for t in expected.values())
    with FisherMonitor(model) as monitor:
        losses(model(x)).mean().backward()
    report = fisher_report(model, lambda outputs, _: losses(outputs).mean(), (x, None), progress=False)["fisher_trace"]
    for parameter, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[parameter, "fisher_trace"]), t.mean(), everything)
        assert_equal(torch.tensor(report[parameter]), t.mean(), everything)


def test_trap_29_what_takes_real_numbers_only_says_so() -> None:
    model, x, y = models()["layers"], torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    complex_outputs = nn.Linear(4, 3, dtype=C)
    with pytest.raises(UnsupportedError, match="real outputs"):
        generalized_fisher_trace(complex_outputs, complex_outputs(x.to(C)), None, "mse")
    with pytest.raises(UnsupportedError, match=r"'first.weight' is complex.*view_as_complex"):
        hessian_trace(model, F.cross_entropy, x, y)
    report = fisher_report(model, F.cross_entropy, (x, y), progress=False)
    with pytest.raises(UnsupportedError, match=r"'first.weight' is complex.*view_as_complex"):
        weight_saliency(model, report)
