"""Seeds: exact ones are square roots of the output's curvature, drawn ones are so on average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import output_curvature
from torch_secorder import fisher_report, generalized_fisher_trace
from torch_secorder.errors import ArgumentError, CurvatureError
from torch_secorder.likelihoods import LastLayer, likelihood

LOSS_TYPES = ["nll", "bce", "mse", "poisson"]
SHAPES = [(3, 4), (3, 4, 2), (2, 3, 2, 2)]


def curvatures(outputs: Tensor, loss_type: str, ignored: Tensor | None = None, class_axis: int = 1) -> Tensor:
    rows = [
        output_curvature(outputs[n : n + 1], loss_type, None if ignored is None else ignored[n], class_axis)
        for n in range(len(outputs))
    ]
    return torch.stack(rows)


def products(seed: Tensor) -> Tensor:
    s = seed.flatten(1)
    return s[:, :, None] * s[:, None]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_seeds_are_a_square_root(loss_type: str, shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, dtype=torch.float64)
    model = likelihood(loss_type, outputs, None)
    seeds = list(model.exact_output_gradients(outputs))
    assert len(seeds) == model.exact_passes(outputs)
    assert all(seed.shape == outputs.shape for seed in seeds)
    total = torch.stack([products(seed) for seed in seeds]).sum(0)
    torch.testing.assert_close(total, curvatures(outputs, loss_type), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "shape", "passes"),
    [("nll", (5, 4), 3), ("nll", (5, 4, 2, 3), 18), ("bce", (5, 4), 4), ("mse", (5, 2, 3), 6), ("poisson", (5,), 1)],
)
def test_the_number_of_exact_passes(loss_type: str, shape: tuple[int, ...], passes: int) -> None:
    outputs = torch.randn(shape)
    assert likelihood(loss_type, outputs, None).exact_passes(outputs) == passes


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_drawn_seeds_are_a_square_root_on_average(loss_type: str, shape: tuple[int, ...], k: int) -> None:
    """Of two samples, each of which stands in its batch 3,000 times."""
    outputs = torch.randn(shape, dtype=torch.float64)
    repeated, generator = outputs.repeat(3000, *[1] * (len(shape) - 1)), torch.Generator().manual_seed(0)
    model = likelihood(loss_type, repeated, None)
    draws = torch.stack([products(seed) for seed in model.sampled_output_gradients(repeated, k, generator)]).sum(0)
    draws = draws.unflatten(0, (3000, 2))
    expected = curvatures(outputs, loss_type)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-9).all()
    exact = k >= model.exact_passes(repeated)
    assert (float(draws.std(0).max()) < 1e-12) == exact


@pytest.mark.parametrize("k", range(1, 6))
def test_labels_are_drawn_without_replacement(k: int) -> None:
    """k different labels for each position, or as many as have a probability; the likeliest always, once k allows it."""
    logits = torch.tensor(
        [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0.0, -1000.0, -1000.0, 0.1, -1000.0, -1000.0, 9.0]]
    ).double()
    model, generator = likelihood("nll", logits, None), torch.Generator().manual_seed(k)
    for _ in range(50):
        seeds = torch.stack(list(model.sampled_output_gradients(logits, k, generator)))
        labels = seeds.abs().argmax(-1)
        for sample, possible in ((0, 7), (1, 3)):
            drawn = labels[seeds[:, sample].abs().sum(-1) > 0, sample].tolist()
            assert len(set(drawn)) == len(drawn) == min(k, possible)


LOGITS = {
    "even": [0.0, 0.1, 0.2, -0.1, 0.0, 0.3],
    "uneven": [0.0, 4.0, -3.0, 1.0, 1.5, -8.0],
    "certain": [0.0, 18.0, -3.0, 1.0, 1.5, -8.0],
    "impossible": [0.0, 2.0, -1000.0, 1.0, -1000.0, 0.5],
}


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("inputs", [None, "some", "none"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_start_of_the_drawing_taken_together(
    logits: str, inputs: str | None, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample many times, each with another start on an even grid, is the integral over starts but for the grid's width.

    Between two of the points where a label changes, of which there are at most 2 C k, the products of seeds are constant.
    """
    n = 20_000
    outputs = torch.tensor(LOGITS[logits], dtype=torch.float64).expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    here = torch.tensor([1.0, -2.0, 0.0, 0.5] if inputs == "some" else [0.0] * 4, dtype=torch.float64)
    last_layer = None if inputs is None else LastLayer(here.expand(n, -1), weight)
    grid = ((torch.arange(n) + 0.5) / n).double().view(n, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: grid)
    found = sum(
        products(seed)
        for seed in likelihood("nll", outputs, None).sampled_output_gradients(outputs, k, generator, last_layer)
    )
    expected = output_curvature(outputs[:1], "nll")
    bound = 2 * 6 * k / n * float(found.abs().max())
    assert float((found.mean(0) - expected).abs().max()) <= bound + 1e-12
    largest = outputs[0].softmax(0).max()
    if largest < 0.9:
        assert bound < 0.03 * float(expected.abs().max()), "a grid that is too coarse shows nothing"


@pytest.mark.parametrize("class_axis", [1, 2, -1, -2])
def test_the_class_axis(class_axis: int) -> None:
    outputs = torch.randn(2, 3, 4, dtype=torch.float64)
    seeds = likelihood("nll", outputs, None, class_axis=class_axis).exact_output_gradients(outputs)
    expected = curvatures(outputs, "nll", class_axis=class_axis)
    torch.testing.assert_close(torch.stack([products(s) for s in seeds]).sum(0), expected, rtol=1e-10, atol=1e-12)


def test_ignored_positions() -> None:
    outputs, targets = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(3, (2, 4))
    targets[0, :2] = targets[1, 3] = 7
    model = likelihood("nll", outputs, targets, ignore_index=7)
    expected = curvatures(outputs, "nll", targets == 7)
    seeds = torch.stack([products(s) for s in model.exact_output_gradients(outputs)]).sum(0)
    torch.testing.assert_close(seeds, expected, rtol=1e-10, atol=1e-12)
    for seed in (
        *model.sampled_output_gradients(outputs, 1, torch.Generator().manual_seed(0)),
        model.observed_output_gradient(outputs, targets),
    ):
        assert (seed.transpose(1, 2)[targets == 7] == 0).all()
        assert (seed.transpose(1, 2)[targets != 7] != 0).all()


@pytest.mark.parametrize("wrong", [3, -1, 0.5])
def test_observed_labels_that_are_no_class(wrong: float) -> None:
    outputs, targets = torch.randn(2, 3), torch.tensor([wrong, 0])
    with pytest.raises(ArgumentError, match="targets"):
        likelihood("nll", outputs, targets).observed_output_gradient(outputs, targets)


NEGATIVE_LOG_LIKELIHOODS: dict[str, Any] = {
    "nll": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "bce": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    "mse": lambda f, y: F.mse_loss(f, y, reduction="sum") / 2,
    "poisson": lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_observed_seed_is_the_gradient(loss_type: str, shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = (
        torch.randint(shape[1], (shape[0], *shape[2:])) if loss_type == "nll" else torch.randint(2, shape).double()
    )
    (expected,) = torch.autograd.grad(NEGATIVE_LOG_LIKELIHOODS[loss_type](outputs, targets), outputs)
    torch.testing.assert_close(
        likelihood(loss_type, outputs, targets).observed_output_gradient(outputs.detach(), targets), expected
    )


@pytest.mark.parametrize("confidence", [5.0, 20.0, 60.0, 1e3])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 0, 1]], ids=str)
def test_certain_predictions_keep_their_digits_in_float32(confidence: float, order: list[int]) -> None:
    outputs = torch.tensor([[confidence, 0.3, -1.0]])[:, order]
    seeds = torch.stack([products(s) for s in likelihood("nll", outputs, None).exact_output_gradients(outputs)]).sum(0)
    p = outputs.double().softmax(1)
    expected = p * (p[:, None] * (1 - torch.eye(3))).sum(2)  # p (1 - p), without the subtraction
    if confidence > 100:
        assert (seeds == 0).all()
    else:
        torch.testing.assert_close(seeds.double().diagonal(dim1=1, dim2=2), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_outputs_keep_float32_seeds(loss_type: str) -> None:
    outputs = torch.randn(3, 4).bfloat16()
    seeds = torch.stack(
        [products(s.float()) for s in likelihood(loss_type, outputs, None).exact_output_gradients(outputs)]
    ).sum(0)
    torch.testing.assert_close(seeds.double(), curvatures(outputs.double(), loss_type), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "targets", "options", "message"),
    [
        ("hinge", None, {}, r"hinge.*|loss_type"),
        ("nll", None, {"class_axis": 0}, r"class_axis"),
        ("nll", None, {"class_axis": 3}, r"class_axis"),
        ("nll", torch.zeros(3, 5, dtype=torch.long), {}, r"3, 5"),
    ],
    ids=str,
)
def test_what_does_not_fit(loss_type: str, targets: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CurvatureError, match=message):
        likelihood(loss_type, torch.randn(3, 4, 2), targets, **options)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4,)])
@pytest.mark.parametrize("axis", [-4, -3, 0, 2, 3, 4, 5, 7])
def test_an_axis_of_classes_that_is_none_is_refused_by_all(shape: tuple[int, ...], axis: int) -> None:
    """Also one that a remainder would make another axis."""
    model = nn.Sequential(
        nn.Linear(2, math.prod(shape[1:])), nn.Unflatten(1, shape[1:]) if shape[1:] else nn.Flatten(0)
    )
    x = torch.randn(4, 2)
    fits = axis in range(-len(shape) + 1, len(shape)) and axis != 0
    for run in (
        lambda: generalized_fisher_trace(model, model(x), None, class_axis=axis),
        lambda: fisher_report(model, None, (x, None), fisher="exact", class_axis=axis, progress=False),
        lambda: fisher_report(model, None, {"input": x}, fisher="sampled", class_axis=axis, progress=False),
    ):
        if fits:
            run()
        else:
            with pytest.raises(ArgumentError, match=rf"class_axis={axis} for outputs of shape"):
                run()
