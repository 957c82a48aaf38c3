"""Predictions against loops over weights, allocations against every assignment, and both against what really happens."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy
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


def with_bits(rows: dict[str, tuple[int, list[float]]], widths: tuple[int, ...] = (2, 4, 8)) -> pd.DataFrame:
    frame = pd.DataFrame(
        {name: {"numel": n, **dict(zip(widths, costs, strict=True))} for name, (n, costs) in rows.items()}
    ).T
    frame.columns = ["numel", *widths]
    return frame.astype({"numel": int})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by_function", [False, True])
def test_the_allocation_of_groups_is_the_best_of_all(seed: int, by_function: bool) -> None:
    """Against every assignment in which the members of a group agree, and what is fixed stays."""
    generator = torch.Generator().manual_seed(seed)
    names = ["a.q", "a.k", "a.v", "a.o", "b.q", "b.k", "head"]
    widths = (2, 4, 8)

    def costs() -> list[float]:
        return sorted(torch.rand(3, generator=generator).tolist(), reverse=True)

    rows = {name: (int(torch.randint(1, 9, (), generator=generator)), costs()) for name in names}
    sensitivity, budget = with_bits(rows, widths), 4.5
    groups: Any = [("a.q", "a.k", "a.v"), ["b.q", "b.k"]]
    if by_function:
        groups = lambda name: name[0] if name[-1] in "qkv" else None  # noqa: E731
    found = allocate_bits(sensitivity, 8, groups=groups, fixed={"*": 2, "head": 8, "[ab].*": 4} | {"a.o": 4})
    assert found["bits"].to_dict() == dict.fromkeys(names[:-1], 4) | {"head": 8}
    found = allocate_bits(sensitivity, budget, groups=groups, fixed={"head": 4})
    best, size = math.inf, budget * sum(n for n, _ in rows.values())
    for q, o, k in itertools.product(range(3), repeat=3):
        choice = {"a.q": q, "a.k": q, "a.v": q, "a.o": o, "b.q": k, "b.k": k, "head": 1}
        if sum(rows[name][0] * widths[c] for name, c in choice.items()) <= size:
            best = min(best, sum(rows[name][1][c] for name, c in choice.items()))
    assert found.attrs["predicted"] == pytest.approx(best, rel=1e-9)
    assert found.attrs["size"] <= size
    assert found.loc[["a.q", "a.k", "a.v"], "bits"].nunique() == found.loc[["b.q", "b.k"], "bits"].nunique() == 1
    assert found.loc["head", "bits"] == 4


def test_what_is_fixed_in_floating_point_stays_what_it_is() -> None:
    model = net()
    sensitivity = quantization_sensitivity(model, exact(model), bits=(2, 4))
    found = allocate_bits(sensitivity, 8, fixed={"6.weight": 16})
    assert found.loc["6.weight", ["bits", "predicted"]].tolist() == [16, 0]
    assert found.attrs["not_rounded"] == ["6.weight"]
    assert found.attrs["size"] == int((found["numel"] * found["bits"]).sum())
    before = model[6].weight.detach().clone()
    with quantized(model, found):
        assert torch.equal(model[6].weight, before)
        assert model[4].weight[0].unique().numel() <= 15
    with_column = quantization_sensitivity(model, exact(model), bits=(4, 16))
    assert "not_rounded" not in allocate_bits(with_column, 16, fixed={"6.weight": 16}).attrs
    least = 2 * (sensitivity["numel"].sum() - 24) + 16 * 24
    with pytest.raises(
        ArgumentError, match=rf"for all that is not fixed fit: the budget must be at least {least} bits"
    ):
        allocate_bits(sensitivity, int(least) - 1, unit="bits", fixed={"6.weight": 16})
    everything = allocate_bits(sensitivity, 32, fixed={"*": 32})
    assert (everything.attrs["predicted"], everything.attrs["bits_per_weight"]) == (0, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fixed": {"6.*": 5}}, r"fixed\['6\.\*'\] must be one of the sensitivity's 2, 4 bits, or 16, 32 or 64"),
        ({"fixed": {"6.*": True}}, "must be one of"),
        ({"fixed": {"7.*": 4}}, r"no row of the sensitivity matches '7\.\*'"),
        ({"groups": [("6.weight", "7.weight")]}, "'7.weight' is no row"),
        ({"groups": ["6.weight", ("4.weight", "6.weight")]}, "'6.weight' is in two groups"),
        (
            {"groups": [("4.weight", "6.weight")], "fixed": {"6.weight": 4}},
            r"6\.weight is fixed, and others of its group are not",
        ),
        ({"groups": [("4.weight", "6.weight")], "fixed": {"6.*": 4, "4.*": 2}}, "or at other bits"),
    ],
)
def test_groups_and_fixed_rows_that_mean_nothing(options: Any, words: str) -> None:
    model = net()
    with pytest.raises(ArgumentError, match=words):
        allocate_bits(quantization_sensitivity(model, exact(model), bits=(2, 4)), 8, **options)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_groups_of_a_channel_have_steps_of_their_own(scheme: str, axis: int, size: int) -> None:
    weight = torch.randn(3, 5, 2, dtype=torch.float64)
    found = rounded(weight, 3, scheme, "group", axis, group_size=size).movedim(axis, 0).flatten(1)
    for row, values in zip(found.tolist(), weight.movedim(axis, 0).flatten(1).tolist(), strict=True):
        parts = [by_hand(values[start : start + size], 3, scheme) for start in range(0, len(values), size)]
        assert row == pytest.approx([value for part in parts for value in part], rel=1e-12, abs=1e-12)


def test_a_rounding_of_ones_own() -> None:
    model = net()
    report = exact(model)
    calls = []

    def truncated(weight: Tensor, bits: int) -> Tensor:
        calls.append(bits)
        return (weight * 2**bits).trunc() / 2**bits

    found = quantization_sensitivity(model, report, bits=(2, 5), rounding=truncated)
    assert calls == [2, 5] * 4
    assert (found.attrs["scheme"], found.attrs["per"]) == ("truncated", "rounding")
    for name, row in found.iterrows():
        weight = model.get_parameter(str(name)).detach().double()
        error = weight - (weight * 4).trunc() / 4
        expected = 0.5 * report.loc[name, "fisher_mean"] * float(error.square().sum())
        assert row[2] == pytest.approx(expected, rel=1e-5)
    before = model[6].weight.detach().clone()
    with quantized(model, {"6.weight": 2}, rounding=truncated):
        assert torch.equal(model[6].weight, (before * 4).trunc() / 4)
    assert torch.equal(model[6].weight, before)
    grouped = quantization_sensitivity(model, report, bits=3, per="group", group_size=16)
    assert grouped.attrs["group_size"] == 16
    weight = model[4].weight.detach()
    error = (rounded(weight, 3, per="group", group_size=16) - weight).double()
    expected = 0.5 * report.loc["4.weight", "fisher_mean"] * float(error.square().sum())
    assert grouped.loc["4.weight", 3] == pytest.approx(expected, rel=1e-5)
    assert grouped.loc["4.weight", 3] < quantization_sensitivity(model, report, bits=3).loc["4.weight", 3]
    assert allocate_bits(grouped, 3).attrs["group_size"] == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per": "group"}, "belong together"),
        ({"group_size": 4}, "belong together"),
        ({"per": "group", "group_size": 0}, "group_size must be an int >= 1"),
        ({"rounding": "nearest"}, "rounding must be a function"),
        ({"rounding": torch.round, "per": "group", "group_size": 4}, "leave out per= and group_size="),
        ({"rounding": lambda w, b: w[:1]}, r"rounding\(0\.weight, 4\) must return a finite tensor"),
        ({"rounding": lambda w, b: w / 0}, "must return a finite tensor"),
        ({"rounding": lambda w, b: 1.0}, "not float"),
    ],
)
def test_roundings_that_mean_nothing(options: Any, words: str) -> None:
    model = net()
    with pytest.raises(ArgumentError, match=words):
        quantization_sensitivity(model, exact(model), bits=4, **options)


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


@pytest.mark.parametrize("differentiates", [True, False])
def test_rounded_weights_leave_the_grad_mode_alone(differentiates: bool) -> None:
    model = nn.Linear(4, 3)
    with torch.set_grad_enabled(differentiates), quantized(model, bits=2):
        assert model(torch.randn(2, 4)).requires_grad == differentiates


def test_numpys_numbers_are_numbers() -> None:
    model = net()
    sensitivity = quantization_sensitivity(model, exact(model))
    for budget in (numpy.int64(4), numpy.float32(4), numpy.float64(4)):
        assert allocate_bits(sensitivity, budget).equals(allocate_bits(sensitivity, 4))
    with pytest.raises(ArgumentError, match="finite"):
        allocate_bits(sensitivity, math.inf)
    with quantized(model, 3):
        expected = [p.detach().clone() for p in model.parameters()]
    with quantized(model, numpy.int64(3)):
        assert all(map(torch.equal, model.parameters(), expected))


def test_a_sensitivity_from_a_file_keeps_the_names(tmp_path: Path) -> None:
    model = net()
    sensitivity = quantization_sensitivity(model, exact(model))
    sensitivity.to_csv(tmp_path / "sensitivity.csv")
    again = pd.read_csv(tmp_path / "sensitivity.csv")
    assert allocate_bits(again, 4)["bits"].to_dict() == allocate_bits(sensitivity, 4)["bits"].to_dict()
    assert uniform_bits(again, 4)["bits"].to_dict() == uniform_bits(sensitivity, 4)["bits"].to_dict()


def test_codes_are_not_rounded_and_the_remedy_is_told() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.arange(12, dtype=torch.int8).view(4, 3), requires_grad=False)
    with pytest.raises(ArgumentError, match=r"0\.weight holds torch\.int8 .*leave it out"), quantized(model, 4):
        pass
    with quantized(model, {"1.weight": 4}):
        assert torch.equal(model[0].weight, torch.arange(12).view(4, 3))
