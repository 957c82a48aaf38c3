"""The derivative of a trace where a gradient is zero, of padding or behind a closed gate: it need not be zero, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from oracles import assert_equal
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.errors import ShapeError, UnsupportedError, VerificationError

WIDTH, PLACES, CLASSES = 4, 6, 3


def normalized(m: nn.Module, x: Tensor) -> Tensor:
    """A norm over features, whose output of padding is its bias, zero at first, with a derivative in that bias."""
    return m.norm(x.mT).mT


def stacked_copies(m: nn.Module, x: Tensor) -> Tensor:
    """All samples share the rows of a product, which get a gradient of those samples alone that are no padding."""
    h = normalized(m, x)
    rows = m.layer(m.table)
    return m.head(torch.einsum("lbtd,sd->slbt", torch.stack([h, h.tanh()]), rows).sum(1).permute(1, 2, 0).mean(1))


def biased_attention(m: nn.Module, x: Tensor) -> Tensor:
    """All samples share a bias of their scores, whose values are zero for padding."""
    h, place = normalized(m, x), torch.arange(x.shape[1])
    bias = m.bias(place[:, None] - place + PLACES)[..., 0]
    return m.head(((h @ h.mT + bias).softmax(-1) @ h).amax(1))


def as_many_places_as_samples(m: nn.Module, x: Tensor) -> Tensor:
    """A single entry has a gradient, by which both axes explain it."""
    return m.head((m.layer(x) * normalized(m, x)).sum(1))


def rows_for_samples(m: nn.Module, x: Tensor) -> Tensor:
    """As many rows that all samples share as there are samples, of which one has a gradient, and of the first sample."""
    h = normalized(m, x)
    return m.head((h @ m.layer(m.table[: m.rows]).mT).mean(1) @ m.table[: m.rows])


PROGRAMS = {f.__name__: f for f in (stacked_copies, biased_attention, as_many_places_as_samples, rows_for_samples)}


def model_of(forward: Callable[[nn.Module, Tensor], Tensor], rows: int = CLASSES) -> nn.Module:
    own = {"norm": nn.GroupNorm(2, WIDTH), "layer": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, CLASSES)}
    model = Forward(forward, **own, bias=nn.Embedding(2 * PLACES, 1))
    model.table, model.rows = nn.Parameter(torch.randn(WIDTH, WIDTH)), rows
    return model.double()


def padding_but_for_one_token(n: int, places: int) -> tuple[Tensor, Tensor]:
    x = torch.zeros(n, places, WIDTH, dtype=torch.float64)
    x[0, 0] = torch.randn(WIDTH)
    return x, torch.arange(n) % CLASSES


def by_plain_autograd(model: nn.Module, losses: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sum of squared norms of each loss' gradient over their number, and its gradient."""
    parameters = list(model.parameters())
    norms = [
        sum(
            g.square().sum()
            for g in torch.autograd.grad(one, parameters, create_graph=True, allow_unused=True)
            if g is not None
        )
        for one in losses
    ]
    value = sum(norms) / len(losses)
    return value, gradients(model, value)


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_22_the_derivative_where_samples_have_no_gradient(name: str, n: int) -> None:
    model = model_of(PROGRAMS[name], rows=n)
    x, y = padding_but_for_one_token(n, n if name == "as_many_places_as_samples" else PLACES)
    losses = nn.CrossEntropyLoss(reduction="none")
    expected, slopes = by_plain_autograd(model, losses(model(x), y))
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_22_the_derivative_of_the_generalized_trace(name: str) -> None:
    model = model_of(PROGRAMS[name])
    x, _ = padding_but_for_one_token(3, 3 if name == "as_many_places_as_samples" else PLACES)
    outputs = model(x)
    per_class, slopes = by_plain_autograd(model, outputs.flatten())
    expected = per_class * outputs[0].numel()
    value = generalized_fisher_trace(model, model(x), None, "mse", create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), [outputs[0].numel() * slope for slope in slopes])


class InducingPoints(nn.Module):
    """As many points as samples, all at zero, whose two products with a scale get a gradient of one of them only."""

    def __init__(self, points: int):
        super().__init__()
        self.points, self.scale = nn.Parameter(torch.zeros(points, 2)), nn.Parameter(torch.zeros(()))
        self.register_buffer("jitter", torch.randn(points, points))

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.points).square().sum(-1)
        return (self.scale.exp() * distances) @ (self.scale.exp() * (self.points @ self.points.T) + self.jitter)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_trap_22_the_derivative_after_a_monitor_has_seen_the_model(n: int) -> None:
    """What the numbers of its batches have shown it is good for traces, and not for their derivatives."""
    model, x, y = InducingPoints(n).double(), torch.randn(n, 2).double(), torch.randn(n, n).double()
    expected, slopes = by_plain_autograd(model, (model(x) - y).square().mean(1))
    with FisherMonitor(model):
        nn.functional.mse_loss(model(x), y).backward()
    value = empirical_fisher_trace(model, nn.MSELoss(), x, y, create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


def of_experts(m: nn.Module, x: Tensor) -> Tensor:
    """An expert without a token, whose product is empty."""
    parts = x[:, 0].split([0, len(x)])
    return m.head(torch.cat([part @ m.table * (1 + number) for number, part in enumerate(parts)]).tanh())


def sorted_steps(m: nn.Module, x: Tensor) -> Tensor:
    """Samples are sorted by their lengths, which are in no order, and sorted back."""
    lengths = (x[:, 0, 0] > 0) + 1
    packed = nn.utils.rnn.pack_padded_sequence(m.layer(x), lengths, batch_first=True, enforce_sorted=False)
    return m.head(m.lstm(packed)[1][0][-1])


def test_trap_22_the_derivative_of_an_expert_without_a_token() -> None:
    model, (x, y) = model_of(of_experts), as_many_classes_as_samples()
    assert_differentiable(model, x, y)


def sampled_grid_of_steps(m: nn.Module, x: Tensor) -> Tensor:
    """All of each sample is read at other places, and the outputs have steps in front."""
    h = nn.functional.grid_sample(
        m.layer(x)[:, None], torch.zeros(len(x), CLASSES, WIDTH, 2).to(x), align_corners=False
    )
    return m.head(h[:, 0]).transpose(0, 1)


def test_trap_22_the_derivative_of_what_no_label_follows() -> None:
    """As many classes as samples, whose axes look alike where a model's own steps may be in front."""
    model, (x, y) = model_of(sorted_steps), as_many_classes_as_samples()
    x[:, 0, 0] = torch.tensor([-1.0, 1.0, -1.0])
    model.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True).double()
    with pytest.raises(ShapeError, match=r"mixes or sorts its samples, pass batch_axis=\{'outputs': 0\}"):
        empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    assert_differentiable(model, x, y, batch_axis={"outputs": 0})


def test_trap_22_steps_in_front_behind_what_no_label_follows() -> None:
    model, x = model_of(sampled_grid_of_steps), torch.randn(CLASSES, CLASSES, WIDTH).double()
    y = torch.arange(CLASSES).expand(CLASSES, -1)
    with pytest.raises(ShapeError, match=r"behind steps or members of an ensemble, pass batch_axis=\{'outputs': 1\}"):
        empirical_fisher_trace(model, lambda o, y: nn.functional.cross_entropy(o.mT, y), x, y, create_graph=True)


def sorted_and_sorted_back(m: nn.Module, x: Tensor) -> Tensor:
    """Outputs with steps in front, of samples that are sorted by their numbers before a parameter takes part."""
    order = x.sum((1, 2)).argsort()
    h = m.layer(x[order])
    back = torch.empty_like(h)
    back[order] = h
    return m.head(back).transpose(0, 1)


def packed_and_padded_again(m: nn.Module, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, (x[:, 0, 0] > 0) + 1, batch_first=True, enforce_sorted=False)
    found, _ = nn.utils.rnn.pad_packed_sequence(m.lstm(packed)[0], batch_first=True, total_length=CLASSES)
    return m.head(found).transpose(0, 1)


def of_steps(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("forward", [sorted_and_sorted_back, packed_and_padded_again])
def test_trap_22_steps_in_front_of_sorted_samples(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """As many steps as samples, and nothing in the graph that tells them apart: a sample that runs alone does."""
    model, x = model_of(forward), torch.randn(CLASSES, CLASSES, WIDTH).double()
    x[:, 0, 0] = torch.tensor([-1.0, 20.0, -20.0])
    model.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True).double()
    y = torch.randint(CLASSES, (CLASSES, CLASSES))
    with pytest.raises(VerificationError, match=r"or the batch is not on the axis assumed \(batch_axis=\)"):
        empirical_fisher_trace(model, of_steps, x, y, create_graph=True)
    axes = {"outputs": 1, "targets": 1}
    value = empirical_fisher_trace(model, of_steps, x, y, create_graph=True, batch_axis=axes)
    outputs = model(x)
    losses = torch.stack([of_steps(outputs[:, [n]], y[:, [n]]) for n in range(CLASSES)])
    expected, slopes = by_plain_autograd(model, losses)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


def as_many_classes_as_samples() -> tuple[Tensor, Tensor]:
    return torch.randn(CLASSES, PLACES, WIDTH).double(), torch.arange(CLASSES)


def assert_differentiable(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> None:
    expected, slopes = by_plain_autograd(model, nn.CrossEntropyLoss(reduction="none")(model(x), y))
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True, **options)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


def assert_slopes(found: list[Tensor], expected: list[Tensor]) -> None:
    size = max(float(slope.abs().max()) for slope in expected)
    assert size > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * size)


class RowInFront(torch.autograd.Function):
    """A product with one row in front, by which calls of its node show nothing of samples."""

    @staticmethod
    def forward(ctx: FunctionCtx, copies: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(copies, rows)
        return torch.einsum("lbtd,sd->slbt", copies, rows)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        copies, rows = ctx.saved_tensors
        return torch.einsum("slbt,sd->lbtd", grad[0], rows), torch.einsum("slbt,lbtd->sd", grad[0], copies)


def hidden_copies(m: nn.Module, x: Tensor) -> Tensor:
    h = normalized(m, x)
    found = RowInFront.apply(torch.stack([h, h.tanh()]), m.layer(m.table))[0]
    return m.head(found.sum(1).permute(1, 2, 0).mean(1))


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_22_what_nothing_but_numbers_shows_is_refused() -> None:
    model, loss_fn = model_of(hidden_copies), nn.CrossEntropyLoss()
    x, y = padding_but_for_one_token(3, PLACES)
    with pytest.raises(
        UnsupportedError, match=r"layer.bias, table: some samples have no gradient.*leave out create_graph"
    ):
        empirical_fisher_trace(model, loss_fn, x, y, create_graph=True)
    losses = nn.CrossEntropyLoss(reduction="none")
    expected, _ = by_plain_autograd(model, losses(model(x), y))
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), expected, expected)
    # Without the samples that are nothing but padding.
    expected, slopes = by_plain_autograd(model, losses(model(x[:1]), y[:1]))
    value = empirical_fisher_trace(model, loss_fn, x[:1], y[:1], create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


def tied(m: nn.Module, x: Tensor) -> Tensor:
    """A layer is used plainly, and once more behind the gate."""
    h = x + m.gate * m.layer(x)
    return m.head((h + m.layer(h.tanh())).tanh())


def on_constants_and_data(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(x * m.layer(m.constants).mean(0) + m.gate * m.layer(x))


def on_constants_twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(x * m.layer(m.constants[:1]) + m.gate * x * m.layer(m.constants).mean(0))


def on_parameters_and_constants(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(x * m.layer(m.table[:1]) + m.gate * x * m.layer(m.constants[:1]))


def product_of_a_parameter(m: nn.Module, x: Tensor) -> Tensor:
    return m.head((m.constants[:1] @ m.table) * x + m.gate * (x @ m.table))


def adapter(m: nn.Module, x: Tensor) -> Tensor:
    """An adapter whose last weight begins at zero, behind a layer that is used elsewhere, too."""
    return m.head(x * m.layer(m.constants[:1]) + m.gate * m.adapter(m.layer(x)))


def attention_to_constants(m: nn.Module, x: Tensor) -> Tensor:
    return m.head((x @ m.layer(m.constants).mT).softmax(-1) @ m.constants + m.gate * m.layer(x))


def numbers(x: Tensor) -> Tensor:
    """Those of the samples, which stand in the data: what a sample reads does not depend on its place in the batch."""
    return x[:, 0].round().long()


def a_row_of_a_table_for_each_sample(m: nn.Module, x: Tensor) -> Tensor:
    """As many rows as samples, of which each reads another, so that nothing but the gate tells that all share them."""
    rows = m.layer(m.constants[: m.rows])
    return m.head(x * rows.roll(1, 0)[numbers(x)] + m.gate * rows.mean(0))


def a_row_of_a_computed_parameter(m: nn.Module, x: Tensor) -> Tensor:
    rows = m.table.tanh()
    which = (m.rows - 1 - numbers(x)) % len(rows)
    return m.head(x * rows[which] + m.gate * m.adapter(rows.mean(0)))


def samples_mixed_behind_the_gate(m: nn.Module, x: Tensor) -> Tensor:
    """The samples' own gradients are those of each one's loss in this batch."""
    h = m.layer(x)
    return m.head(h + m.gate * h.mean(0))


def first_of_several_steps(m: nn.Module, x: Tensor) -> Tensor:
    """The state of a recurrence is zero at its first step, in any batch."""
    h = torch.zeros_like(x)
    for _ in range(3):
        h = h * m.table[0] + m.layer(x)
    return m.head(h + m.gate)


GATED = {
    f.__name__: f
    for f in (
        tied,
        on_constants_and_data,
        on_constants_twice,
        on_parameters_and_constants,
        product_of_a_parameter,
        adapter,
        attention_to_constants,
        a_row_of_a_table_for_each_sample,
        a_row_of_a_computed_parameter,
        first_of_several_steps,
    )
}


def gated(forward: Callable[[nn.Module, Tensor], Tensor], gate: float, rows: int = 5) -> nn.Module:
    own = {name: nn.Linear(WIDTH, size) for name, size in (("layer", WIDTH), ("head", CLASSES), ("adapter", WIDTH))}
    model = Forward(forward, **own)
    nn.init.zeros_(model.adapter.weight)
    model.gate, model.table = nn.Parameter(torch.tensor(gate)), nn.Parameter(torch.randn(WIDTH, WIDTH))
    model.rows = rows
    model.register_buffer("constants", torch.randn(5, WIDTH))
    return model.double()


@pytest.mark.parametrize("gate", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, WIDTH, 5])
@pytest.mark.parametrize("name", GATED)
@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_22_the_derivative_behind_a_gate(name: str, n: int, gate: float) -> None:
    """The uses' gradients are added up before they are squared, so that the derivative of a zero one counts."""
    model = gated(GATED[name], gate, rows=n)
    x, y, losses = (
        torch.randn(n, WIDTH, dtype=torch.float64),
        torch.arange(n) % CLASSES,
        nn.CrossEntropyLoss(reduction="none"),
    )
    x[:, 0] = torch.arange(n)
    expected, slopes = by_plain_autograd(model, losses(model(x), y))
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)
    expected, slopes = by_plain_autograd(model, model(x).flatten())
    value = generalized_fisher_trace(model, model(x), None, "mse", create_graph=True)
    assert_equal(value, CLASSES * expected, CLASSES * expected)
    assert_slopes(gradients(model, value), [CLASSES * slope for slope in slopes])


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_trap_22_the_derivative_where_samples_are_mixed_behind_a_gate(gate: float) -> None:
    """A sample alone has another gradient; in a graph of the program's own nothing is run alone."""
    model = gated(samples_mixed_behind_the_gate, gate)
    x, y = torch.randn(5, WIDTH, dtype=torch.float64), torch.arange(5) % CLASSES
    with pytest.raises(VerificationError, match="samples influence each other"):
        empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    expected, slopes = by_plain_autograd(model, nn.CrossEntropyLoss(reduction="none")(model(x), y))
    value = generalized_fisher_trace(model, model(x), y, labels="observed", create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(model, value), slopes)


class LayerInFront(torch.autograd.Function):
    """A sum with one row in front, by which calls of its node show nothing of samples."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x[None].clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad[0]


def hidden_behind_a_gate(m: nn.Module, x: Tensor) -> Tensor:
    return m.head((x + m.gate * LayerInFront.apply(m.layer(x))[0] + m.layer(x.tanh())).tanh())


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_trap_22_a_use_behind_a_gate_of_which_nothing_tells_is_refused() -> None:
    """Four samples are as many as features, so that shapes don't show where they are."""
    x, y, losses = (
        torch.randn(WIDTH, WIDTH, dtype=torch.float64),
        torch.arange(WIDTH) % CLASSES,
        nn.CrossEntropyLoss(reduction="none"),
    )
    closed, loss_fn = gated(hidden_behind_a_gate, 0.0), nn.CrossEntropyLoss()
    expected, _ = by_plain_autograd(closed, losses(closed(x), y))
    assert_equal(empirical_fisher_trace(closed, loss_fn, x, y), expected, expected)
    with pytest.raises(UnsupportedError, match=r"layer.weight.*of which one has a zero gradient.*small number"):
        empirical_fisher_trace(closed, loss_fn, x, y, create_graph=True)
    opened = gated(hidden_behind_a_gate, 1e-3)
    expected, slopes = by_plain_autograd(opened, losses(opened(x), y))
    value = empirical_fisher_trace(opened, loss_fn, x, y, create_graph=True)
    assert_equal(value, expected, expected)
    assert_slopes(gradients(opened, value), slopes)
