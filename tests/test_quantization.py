"""Predictions against loops over weights, allocations against every assignment, and both against what really happens."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from torch_secorder import FisherMonitor, fisher_report, fisher_results
from torch_secorder.errors import ArgumentError, CurvatureError
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, rounded, uniform_bits
from torch_secorder.tables import read_report


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(75, 6),
        nn.Tanh(),
        nn.Linear(6, 4),
    )


def exact(model: nn.Module, n: int = 16, **options: Any) -> pd.DataFrame:
    data = (torch.randn(n, 2, 6, 6), None)
    return fisher_report(model, None, data, fisher="exact", progress=False, **options)


def by_hand(values: list[float], bits: int, scheme: str) -> list[float]:
    """One group of weights, number by number, to the nearest of all levels."""
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        if top == 0:
            size = sum(map(abs, values)) / len(values)
            levels = [-size, size]
        else:
            step = max(map(abs, values)) / top
            levels = [k * step for k in range(-top, top + 1)]
    else:
        low, high = min(0.0, *values), max(0.0, *values)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        levels = [(k - zero) * step for k in range(2**bits)]
    return [min(levels, key=lambda level: abs(level - value)) for value in values]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_every_weight_goes_to_its_nearest_level(bits: int, scheme: str, shift: float) -> None:
    weight = torch.randn(3, 5, 2, dtype=torch.float64) + shift
    whole = torch.tensor(by_hand(weight.flatten().tolist(), bits, scheme), dtype=torch.float64).view_as(weight)
    torch.testing.assert_close(rounded(weight, bits, scheme), whole)
    for axis in (0, 1):
        groups = [by_hand(part.flatten().tolist(), bits, scheme) for part in weight.movedim(axis, 0)]
        moved = torch.tensor(groups, dtype=torch.float64).view(weight.movedim(axis, 0).shape)
        torch.testing.assert_close(rounded(weight, bits, scheme, "channel", axis), moved.movedim(0, axis))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_agrees_with_torchs_own(bits: int) -> None:
    weight = torch.randn(5, 7)
    top = 2 ** (bits - 1) - 1
    scales = weight.abs().amax(1) / top
    expected = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(5), 0, -top, top)
    torch.testing.assert_close(rounded(weight, bits, "symmetric", "channel"), expected)
    low, high = min(0.0, float(weight.min())), max(0.0, float(weight.max()))
    scale = (high - low) / (2**bits - 1)
    expected = torch.fake_quantize_per_tensor_affine(weight, scale, round(-low / scale), 0, 2**bits - 1)
    torch.testing.assert_close(rounded(weight, bits, "affine"), expected)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_what_is_special_about_rounding(scheme: str) -> None:
    assert (rounded(torch.zeros(3, 2), 4, scheme) == 0).all()
    assert (rounded(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), 4, scheme, "channel")[0] == 0).all()
    assert rounded(torch.randn(4, 3).half(), 4, scheme).dtype == torch.float16
    assert rounded(torch.empty(0, 3), 4, scheme).shape == (0, 3)
    weight = torch.randn(6)
    torch.testing.assert_close(rounded(weight, 4, scheme, "channel"), rounded(weight, 4, scheme))
    twice = rounded(rounded(weight, 4, scheme), 4, scheme)
    torch.testing.assert_close(twice, rounded(weight, 4, scheme))
    assert rounded(torch.tensor(0.3), 4, scheme).shape == ()


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_prediction_from_traces(reduction: str, per: str) -> None:
    model = net()
    report = exact(model, reduction=reduction)
    found = quantization_sensitivity(model, report, bits=(2, 5), per=per, parameters="all")
    assert list(found.columns) == ["kind", "numel", 2, 5]
    assert list(found.index) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        trace = report.loc[name, "fisher_trace"] / (16 if reduction == "sum" else 1)
        axis = 1 if name == "2.weight" else 0
        for b in (2, 5):
            delta = rounded(p, b, "symmetric", per, axis) - p.detach()
            expected = 0.5 * trace / p.numel() * float(delta.double().square().sum())
            assert found.loc[name, b] == pytest.approx(expected, rel=1e-5)
    assert found.attrs == {
        "scheme": "symmetric",
        "per": per,
        "fisher": "exact",
        "basis": "trace",
        "unit": "nats per sample",
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_prediction_from_the_diagonal(reduction: str) -> None:
    """Against a loop over samples with plain autograd."""
    model = net()
    x = torch.randn(5, 2, 6, 6)
    labels = torch.randint(4, (5,))
    with FisherMonitor(model, reduction, diagonal=True) as monitor:
        nn.functional.cross_entropy(model(x), labels, reduction=reduction).backward()
    found = quantization_sensitivity(model, monitor, bits=(3,), fisher="sampled")
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(5):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), labels[n : n + 1])
        for name, g in zip(squares, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            squares[name] += g.square() / 5
    assert list(found.index) == ["0.weight", "2.weight", "4.weight", "6.weight"]
    for name in found.index:
        p = model.get_parameter(name).detach()
        delta = rounded(p, 3, "symmetric", "channel", 1 if name == "2.weight" else 0) - p
        expected = sum(
            0.5 * float(f) * float(d) ** 2 for f, d in zip(squares[name].flatten(), delta.flatten(), strict=True)
        )
        assert found.loc[name, 3] == pytest.approx(expected, rel=1e-4)
    report = monitor.report()
    same = quantization_sensitivity(model, report, bits=(3,), fisher="sampled", diagonal=monitor.diagonal)
    pd.testing.assert_frame_equal(found, same)


def test_the_prediction_comes_true_for_small_errors() -> None:
    model = net().double()
    x = torch.randn(64, 2, 6, 6, dtype=torch.float64)
    report = fisher_report(model, None, (x, None), fisher="exact", progress=False)
    found = quantization_sensitivity(model, report, bits=(8, 10), per="tensor")
    with torch.no_grad():
        before = model(x).log_softmax(1)
        for name in found.index:
            for b in (8, 10):
                with quantized(model, {name: b}, per="tensor"):
                    after = model(x).log_softmax(1)
                actual = float((before.exp() * (before - after)).sum(1).mean())
                assert found.loc[name, b] == pytest.approx(actual, rel=2), "the trace ignores which weights matter"


def test_activations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh()), nn.Linear(8, 3))
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    with FisherMonitor(model, "sum", activations=True) as monitor:
        for part, y in zip(x.split(3), labels.split(3), strict=True):
            nn.functional.cross_entropy(model(part), y, reduction="sum").backward()
    found = quantization_sensitivity(model, monitor, bits=(2, 4), scheme="affine", activations=True, fisher="sampled")
    outputs = found[found["kind"] == "activation"]
    assert sorted(outputs.index) == ["0", "1.0", "2"]
    assert outputs.loc["0", "numel"] == 8
    values = model[0](x).detach()
    a = values.clone().requires_grad_()
    nn.functional.cross_entropy(model[2](model[1](a)), labels, reduction="sum").backward()
    assert a.grad is not None
    spread = max(0.0, float(values.max())) - min(0.0, float(values.min()))
    for b in (2, 4):
        noise = (spread / (2**b - 1)) ** 2 / 12
        assert outputs.loc["0", b] == pytest.approx(0.5 * noise * float(a.grad.square().sum()) / 6, rel=1e-4)
    chosen = quantization_sensitivity(
        model, monitor.report(), activations=monitor.activations.loc[["2"]], fisher="sampled", bits=(4,)
    )
    assert list(chosen[chosen["kind"] == "activation"].index) == ["2"]
    with pytest.raises(ArgumentError, match=r"monitor\.activations"):
        quantization_sensitivity(model, monitor.report(), activations=True, fisher="sampled")
    with pytest.raises(ArgumentError, match="apart"):
        allocate_bits(found, 4)
    with pytest.raises(ArgumentError, match="affine"):
        quantization_sensitivity(model, monitor, bits=(1,), activations=True, fisher="sampled")


@pytest.mark.parametrize("fisher", ["empirical", "observed"])
def test_a_fisher_of_given_labels_warns(fisher: str) -> None:
    model = net()
    data = (torch.randn(4, 2, 6, 6), torch.randint(4, (4,)))
    report = fisher_report(model, nn.CrossEntropyLoss(), data, fisher=fisher, progress=False)
    with pytest.warns(UserWarning, match="no KL divergence"):
        quantization_sensitivity(model, report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantization_sensitivity(model, report, fisher="sampled")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_report_from_a_file_predicts_the_same(tmp_path: Any, reduction: str) -> None:
    model = net()
    report = exact(model, reduction=reduction)
    expected = quantization_sensitivity(model, report)
    report.assign(**report.attrs).to_csv(tmp_path / "report.csv")
    again = read_report(tmp_path / "report.csv")
    assert {key: again.attrs[key] for key in ("reduction", "fisher", "n_samples")} == {
        "reduction": reduction,
        "fisher": "exact",
        "n_samples": 16,
    }
    plain = pd.read_csv(tmp_path / "report.csv")
    for source in (again, plain, plain.set_index("parameter")):
        pd.testing.assert_frame_equal(quantization_sensitivity(model, source), expected)


def test_a_file_that_is_no_report(tmp_path: Any) -> None:
    model = net()
    report = exact(model)
    report.to_csv(tmp_path / "bare.csv")
    with pytest.raises(ArgumentError, match=r"lacks reduction, fisher, n_samples.*report\.attrs"):
        read_report(tmp_path / "bare.csv")
    with pytest.raises(ArgumentError, match=r"doesn't say its reduction.*report\.attrs"):
        quantization_sensitivity(model, pd.read_csv(tmp_path / "bare.csv"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArgumentError, match="no column 'parameter'"):
        read_report(tmp_path / "other.csv")
    for content in (b"", b"\xff\xfe\x00", b'"a\n'):
        (tmp_path / "torn.csv").write_bytes(content)
        with pytest.raises(ArgumentError, match=r"torn\.csv is no CSV file"):
            read_report(tmp_path / "torn.csv")


def test_reports_that_do_not_fit() -> None:
    model = net()
    report = exact(model)
    for other, message in [
        (nn.Linear(3, 2), "another model: Linear has no parameter '0.weight'"),
        (nn.Sequential(nn.Conv2d(2, 5, 3), *net()[1:]), r"0.weight has shape \(4, 2, 3, 3\) there and \(5, 2, 3, 3\)"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            quantization_sensitivity(other, report)
    with pytest.raises(ArgumentError, match="fisher_trace"):
        quantization_sensitivity(model, report.drop(columns="fisher_trace"))
    with pytest.raises(ArgumentError, match="grouped"):
        quantization_sensitivity(model, exact(model, by="module"))
    with pytest.raises(ArgumentError, match="not list"):
        quantization_sensitivity(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not a number that is 0 or more"):
        quantization_sensitivity(model, report.assign(fisher_trace=math.nan))
    with pytest.raises(CurvatureError, match="no sample"):
        quantization_sensitivity(model, FisherMonitor(model))
    with pytest.raises(ArgumentError, match="diagonal of"):
        quantization_sensitivity(model, report, diagonal={"0.weight": torch.ones(3)})
    with pytest.raises(ArgumentError, match="diagonal is of another model: the report has no parameter 'x'"):
        quantization_sensitivity(model, report, diagonal={"x": torch.ones(3)})
    with pytest.raises(ArgumentError, match="no numbers"):
        quantization_sensitivity(model, report.assign(fisher_trace="much"))
    with pytest.raises(ArgumentError, match="n_samples='x'"):
        quantization_sensitivity(model, report.assign(n_samples="x"))
    for no_bits in (report, [4]):
        with pytest.raises(ArgumentError, match=r"what allocate_bits\(\) returned"), quantized(model, no_bits):  # type: ignore[arg-type]
            pass
    one = quantization_sensitivity(model, report, bits=4)
    pd.testing.assert_frame_equal(one, quantization_sensitivity(model, report, bits=(4,)))


@pytest.mark.parametrize("bits", [0, 17, -1, 2.5, True, "4", None])
def test_bits_that_mean_nothing(bits: Any) -> None:
    model = net()
    before = model[6].weight.detach().clone()
    with pytest.raises(ArgumentError, match="whole numbers from 1 to 16"), quantized(model, {"6.weight": bits}):
        pass
    assert torch.equal(model[6].weight, before)
    with pytest.raises(ArgumentError, match="whole numbers from 1 to 16"):
        quantization_sensitivity(model, exact(model), bits=(4, bits))
    with pytest.raises(ArgumentError, match="whole numbers from 1 to 16"):
        rounded(torch.ones(2), bits)


def test_other_arguments_that_mean_nothing() -> None:
    model = net()
    report = exact(model)
    for options in (
        {"scheme": "log"},
        {"per": "row"},
        {"parameters": "some"},
        {"bits": ()},
        {"bits": (4, 4)},
        {"fisher": "x"},
    ):
        with pytest.raises(ArgumentError):
            quantization_sensitivity(model, report, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="infinite or NaN"):
        rounded(torch.tensor([1.0, math.inf]), 4)


def table(costs: Tensor, numel: list[int], widths: tuple[int, ...]) -> pd.DataFrame:
    frame = pd.DataFrame({b: costs[:, i].tolist() for i, b in enumerate(widths)})
    frame.insert(0, "numel", numel)
    frame.index = pd.Index([f"p{i}" for i in range(len(numel))], name="parameter")
    return frame


@pytest.mark.parametrize("seed", range(25))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = (2, 3, 4, 8)
    numel = torch.randint(1, 2000, (5,), generator=generator).tolist()
    scale = 10 ** (6 * torch.rand(5, 1, generator=generator, dtype=torch.float64) - 6)
    costs = scale * torch.rand(5, 4, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    budget = 2 + 6 * float(torch.rand((), generator=generator))
    size = int(budget * sum(numel) + 1e-6)
    best = min(
        sum(float(costs[p, c]) for p, c in enumerate(choice))
        for choice in itertools.product(range(4), repeat=5)
        if sum(numel[p] * widths[c] for p, c in enumerate(choice)) <= size
    )
    found = allocate_bits(table(costs, numel, widths), budget)
    assert found.attrs["predicted"] == pytest.approx(best, rel=1e-9)
    assert found["predicted"].sum() == pytest.approx(best, rel=1e-9)
    assert (found["numel"] * found["bits"]).sum() == found.attrs["size"] <= size
    as_bits = allocate_bits(table(costs, numel, widths), size, unit="bits")
    assert as_bits.attrs["predicted"] == pytest.approx(best, rel=1e-9)


def test_budgets() -> None:
    model = net()
    sensitivity = quantization_sensitivity(model, exact(model))
    n = int(sensitivity["numel"].sum())
    assert set(allocate_bits(sensitivity, 2)["bits"]) == {2}
    assert set(allocate_bits(sensitivity, 100)["bits"]) == {8}
    assert allocate_bits(sensitivity, n / 2, unit="bytes").attrs["bits_per_weight"] <= 4
    four = uniform_bits(sensitivity, 4)
    assert four.attrs["size"] == 4 * n
    assert four.attrs["predicted"] == pytest.approx(sensitivity[4].sum())
    assert allocate_bits(sensitivity, 4).attrs["predicted"] <= four.attrs["predicted"]
    with pytest.raises(ArgumentError, match="at least 2 bits per weight"):
        allocate_bits(sensitivity, 1.9)
    for budget in (0, -1, True, "4", math.nan):
        with pytest.raises(ArgumentError, match="positive number"):
            allocate_bits(sensitivity, budget)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unit"):
        allocate_bits(sensitivity, 4, unit="kilo")
    with pytest.raises(ArgumentError, match="add it to bits"):
        uniform_bits(sensitivity, 5)
    with pytest.raises(ArgumentError, match="not a sensitivity"):
        allocate_bits(exact(model), 4)
    with pytest.raises(ArgumentError, match="negative or not finite"):
        allocate_bits(-sensitivity.drop(columns="kind"), 4)


def test_a_sensitivity_from_a_file_allocates_the_same(tmp_path: Any) -> None:
    model = net()
    sensitivity = quantization_sensitivity(model, exact(model))
    sensitivity.to_csv(tmp_path / "sensitivity.csv")
    again = pd.read_csv(tmp_path / "sensitivity.csv", index_col="parameter")
    assert list(allocate_bits(again, 4)["bits"]) == list(allocate_bits(sensitivity, 4)["bits"])


def test_quantized_models_come_back() -> None:
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with quantized(model, 3):
        assert torch.equal(model[4].weight, rounded(before["4.weight"], 3, per="channel"))
        assert torch.equal(model[2].weight, rounded(before["2.weight"], 3, per="channel", axis=1))
        assert torch.equal(model[4].bias, before["4.bias"])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    allocation = allocate_bits(quantization_sensitivity(model, exact(model)), 4)
    with pytest.raises(KeyError), quantized(model, allocation):
        assert len(model[6].weight[0].unique()) <= 2 ** allocation.loc["6.weight", "bits"]
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(ArgumentError, match=r"no parameter 9\.weight"), quantized(model, {"9.weight": 4}):
        pass


def test_a_monitor_says_whose_labels_it_saw() -> None:
    model = net()
    x = torch.randn(4, 2, 6, 6)
    with FisherMonitor(model, diagonal=True, fisher="sampled") as monitor:
        outputs = model(x)
        labels = torch.distributions.Categorical(logits=outputs).sample()
        nn.functional.cross_entropy(outputs, labels).backward()
    assert monitor.report().attrs["fisher"] == "sampled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantization_sensitivity(model, monitor)
    assert found.attrs["fisher"] == "sampled"
    assert found.attrs["basis"] == "diagonal"
    with pytest.raises(ArgumentError, match="fisher must be one of 'empirical', 'sampled', 'observed'"):
        FisherMonitor(model, fisher="exact")


def test_results_predict_as_their_report_with_its_diagonal() -> None:
    model = net()
    data = (torch.randn(4, 2, 6, 6), None)
    results = fisher_results(
        model, None, data, fisher="exact", reduction="sum", diagonal=True, activations=True, progress=False
    )
    found = quantization_sensitivity(model, results, activations=True)
    mean = fisher_results(model, None, data, fisher="exact", diagonal=True, activations=True, progress=False)
    rows = mean.activations.loc[[name for name in mean.activations.index if name]]
    same = quantization_sensitivity(model, results.report(), activations=rows, diagonal=results.diagonal)
    pd.testing.assert_frame_equal(found, same, check_exact=False, rtol=1e-5)
