"""Trap 19: what counts samples. Shapes coincide, several rows are one sample, or no axis counts them: the user's word decides."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from expectations import expectation
from oracles import assert_equal
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import ArgumentError, CurvatureError, ShapeError, UnsupportedError
from torch_secorder.pruning import Gates
from torch_secorder.verification import separable_loss

N, T = 5, 6
Loss = Callable[[Any, Any], Tensor]


def squares(outputs: Tensor, targets: Tensor | float) -> Tensor:
    return (outputs - targets).square().sum()


def called(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if type(inputs) is tuple else model(inputs)


def looped(model: nn.Module, losses: Sequence[Tensor]) -> dict[str, Tensor]:
    """t_{n,p} by plain autograd, ``[n]`` for each parameter."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return {
        name: torch.stack([torch.zeros(()).double() if g is None else g.square().sum() for g in column])
        for name, column in zip(named, zip(*rows, strict=True), strict=True)
    }


def monitored(model: nn.Module, inputs: Any, targets: Any, loss: Loss, verified: bool, **words: Any) -> FisherMonitor:
    with FisherMonitor(model, "sum", per_sample=True, **words) as monitor:
        outputs = called(model, inputs)
        value = loss(outputs, targets)
        if verified:
            monitor.verify(value)
        value.backward()
    return monitor


def assert_exact(
    model: nn.Module, inputs: Any, targets: Any, alone: Sequence[Tensor], loss: Loss = squares, **words: Any
) -> None:
    """Monitor, report and function give the numbers of the loop, sample by sample."""
    expected = looped(model, alone)
    everything = torch.stack([t.sum() for t in expected.values()]).sum()
    for verified in (False, True):
        monitor = monitored(model, inputs, targets, loss, verified, **words)
        assert monitor.n_samples == len(alone)
        for name, t in expected.items():
            assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, everything, torch.float64)
    table = fisher_report(model, loss, (inputs, targets), reduction="sum", progress=False, **words)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.sum(), everything, torch.float64)
    found = empirical_fisher_trace(model, loss, inputs, targets, **words)
    assert_equal(found, everything, everything, torch.float64)


def refusal(model: nn.Module, inputs: Any, targets: Any, loss: Loss = squares, **words: Any) -> str:
    """What a monitor says, which a report and a function say, too."""
    with pytest.raises(ShapeError) as raised:
        monitored(model, inputs, targets, loss, False, **words)
    for way in (
        lambda: fisher_report(model, loss, (inputs, targets), progress=False, **words),
        lambda: empirical_fisher_trace(model, loss, inputs, targets, **words),
    ):
        with pytest.raises(ShapeError, match=re.escape(str(raised.value))):
            way()
    return str(raised.value)


def remedy(message: str) -> dict[str, Any]:
    """The first batch_axis= that a message names."""
    found = re.search(r"batch_axis=(\{.*?\}+)", message)
    assert found is not None, message
    return {"batch_axis": eval(found.group(1))}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def made(forward: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    return randomized(Forward(forward, **modules)).double()


# Inputs and outputs apart


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_trap_19_sequence_first_in_and_batch_first_out(kind: type[nn.RNNBase]) -> None:
    model, x, y = (
        made(lambda m, x: m.head(m.rnn(x)[0][-1]), rnn=kind(4, 5), head=nn.Linear(5, 3)),
        drawn(T, N, 4),
        drawn(N, 3),
    )
    alone = [squares(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(N)]
    message = refusal(model, x, y)
    assert "6 samples (axis 0 of input 0, shape (6, 5, 4))" in message
    assert "of shape (5, 3)" in message
    assert_exact(model, x, y, alone, **remedy(message))
    assert_exact(model, x, y, alone, batch_axis={"inputs": 1})


@pytest.mark.parametrize("n", [N, T])
def test_trap_19_outputs_with_the_steps_in_front(n: int) -> None:
    """As for CTC, (T, N, C), also with as many samples as steps."""
    model, x, y = (
        made(lambda m, x: m.layer(x).tanh().transpose(0, 1), layer=nn.Linear(4, 3)),
        drawn(n, T, 4),
        drawn(T, n, 3),
    )
    alone = [squares(model(x[i : i + 1]), y[:, i : i + 1]) for i in range(n)]
    message = refusal(model, x, y)
    assert f"{n} samples (axis 0 of input 0, shape ({n}, 6, 4))" in message
    assert "batch_axis={'outputs': 1}" in message
    assert_exact(model, x, y, alone, batch_axis={"outputs": 1})
    assert_exact(model, x, y, alone, batch_axis={"outputs": {0: 1}, "targets": 1})


def test_trap_19_as_many_samples_as_steps_on_the_second_axis_of_the_input() -> None:
    model, x, y = made(lambda m, x: m.layer(x).tanh().sum(0), layer=nn.Linear(4, 3)), drawn(T, T, 4), drawn(T, 3)
    alone = [squares(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(T)]
    assert_exact(model, x, y, alone, **remedy(refusal(model, x, y)))


def chunks(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.chunk(2)])


def one_by_one(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(row[None]) for row in x])


@pytest.mark.parametrize("way", [chunks, one_by_one])
@pytest.mark.parametrize("n", [3, 5])
def test_trap_19_a_layer_that_gets_few_samples_of_as_many_as_there_are_steps(way: Any, n: int) -> None:
    """Where the loss reads one step, the last sample alone has its gradient at the index that its number is."""
    model = made(lambda m, x: m.last(way(m.layer, x).tanh()[:, -1]), layer=nn.Linear(4, 4), last=nn.Linear(4, 3))
    x, y = drawn(n, n, 4), drawn(n, 3)
    assert_exact(model, x, y, [squares(model(x[i : i + 1]), y[i : i + 1]) for i in range(n)])


def test_trap_19_a_layer_that_gets_single_steps_of_as_many_as_there_are_samples() -> None:
    """It shows every sample on the second axis, which the first one of the input is not."""
    model = made(lambda m, x: m.last(one_by_one(m.layer, x).tanh().sum(0)), layer=nn.Linear(4, 4), last=nn.Linear(4, 3))
    x, y = drawn(T, T, 4), drawn(T, 3)
    alone = [squares(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(T)]
    assert_exact(model, x, y, alone, **remedy(refusal(model, x, y)))


def test_trap_19_the_input_is_seen_through_a_transpose() -> None:
    model = made(lambda m, x: m.layer(x.transpose(0, 1)).tanh(), layer=nn.Linear(4, 3))
    x, y = drawn(T, T, 4), drawn(T, T, 3)
    message = refusal(model, x, y)
    assert_exact(
        model, x, y, [squares(model(x[i : i + 1]), y[:, i : i + 1]) for i in range(T)], batch_axis={"outputs": 1}
    )
    alone = [squares(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(T)]
    assert_exact(model, x, y, alone, **remedy(message))


def test_trap_19_an_ensemble_and_spiking_steps_in_front() -> None:
    ensemble = made(lambda m, x: torch.stack([m.one(x), m.two(x)]), one=nn.Linear(4, 3), two=nn.Linear(4, 3))
    x, y = drawn(N, 4), drawn(2, N, 3)
    alone = [squares(ensemble(x[i : i + 1]), y[:, i : i + 1]) for i in range(N)]
    assert_exact(ensemble, x, y, alone, **remedy(refusal(ensemble, x, y)))
    spiking = made(lambda m, x: m.layer(x).tanh().cumsum(0), layer=nn.Linear(4, 3))
    x, y = drawn(3, N, 4), drawn(3, N, 3)
    alone = [squares(spiking(x[:, i : i + 1]), y[:, i : i + 1]) for i in range(N)]
    assert_exact(spiking, x, y, alone, batch_axis=1)
    assert_exact(spiking, x, y, alone, batch_axis={"inputs": 1, "outputs": 1})


def test_trap_19_outputs_by_position_and_name() -> None:
    def forward(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.layer(x).tanh()
        return {"steps": h.transpose(0, 1), "mean": h.mean(1)}

    model, x = made(forward, layer=nn.Linear(4, 3)), drawn(N, T, 4)

    def loss(outputs: dict[str, Tensor], targets: None) -> Tensor:
        return outputs["steps"].square().sum() + outputs["mean"].exp().sum()

    alone = [loss(model(x[i : i + 1]), None) for i in range(N)]
    assert_exact(model, x, None, alone, loss, batch_axis={"outputs": {"steps": 1}})


def test_trap_19_the_fisher_of_the_models_labels_with_samples_on_another_axis() -> None:
    model, x = made(lambda m, x: m.layer(x).transpose(0, 1), layer=nn.Linear(4, 3)), drawn(N, 2, 4)
    with torch.no_grad():
        p = model(x).softmax(-1)
    expected = 0.0
    for i in range(N):
        for t in range(2):
            for label in range(3):
                logit = model(x[i : i + 1])[t, 0].log_softmax(-1)[label]
                gradients = torch.autograd.grad(logit, list(model.parameters()))
                expected += float(p[t, i, label]) * sum(float(g.square().sum()) for g in gradients)
    table = fisher_report(
        model, None, (x, None), fisher="exact", class_axis=2, progress=False, batch_axis={"outputs": 1}
    )
    assert table["fisher_trace"].sum() == pytest.approx(expected / N, rel=1e-9)


# What all samples share


@pytest.mark.parametrize("n", [1, 7])
def test_trap_19_a_batch_of_one_beside_a_shared_input(n: int) -> None:
    model = made(lambda m, x, k: m.head((m.layer(x) @ k.T).tanh()), layer=nn.Linear(4, 4), head=nn.Linear(7, 3))
    x, k, y = drawn(n, 4), drawn(7, 4), drawn(n, 3)
    alone = [squares(model(x[i : i + 1], k), y[i : i + 1]) for i in range(n)]
    words = [{"inputs": {0: 0, 1: None}}, {"inputs": {1: None}}, *([None] if n == 1 else [])]
    for batch_axis in words:
        assert_exact(model, (x, k), y, alone, batch_axis=batch_axis)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.layer(x, src_mask=mask).mean(1))


@pytest.mark.parametrize("n", [1, 5])
def test_trap_19_a_mask_of_steps(n: int) -> None:
    model, x, y = randomized(Encoder()).double(), drawn(n, 5, 8), drawn(n, 3)
    mask = nn.Transformer.generate_square_subsequent_mask(5).double()
    alone = [squares(model(x[i : i + 1], mask), y[i : i + 1]) for i in range(n)]
    assert_exact(model, (x, mask), y, alone, batch_axis={"inputs": {"mask": None}})
    if n == 1:
        assert_exact(model, (x, mask), y, alone)
    else:
        with pytest.raises(CurvatureError, match=re.escape("batch_axis={'inputs': {1: None}}")) as raised:
            fisher_report(model, squares, ((x, mask), y), progress=False)
        assert_exact(model, (x, mask), y, alone, **remedy(str(raised.value)))


def test_trap_19_hidden_states_and_lists_of_lengths() -> None:
    def forward(m: Any, x: Tensor, h: Tensor, lengths: list[int]) -> Tensor:
        steps = torch.arange(x.shape[1])
        kept = torch.stack([steps < length for length in lengths])
        return m.head(m.rnn(x, h)[0]) * kept[..., None]

    model = made(forward, rnn=nn.GRU(3, 4, 2, batch_first=True), head=nn.Linear(4, 3))
    x, h, lengths, y = drawn(N, T, 3), drawn(2, N, 4), [6, 5, 3, 2, 6], drawn(N, T, 3)
    alone = [
        squares(model(x[i : i + 1], h[:, i : i + 1].contiguous(), lengths[i : i + 1]), y[i : i + 1]) for i in range(N)
    ]
    assert_exact(model, (x, h, lengths), y, alone, batch_axis={"inputs": {1: 1, 2: "list"}})


@pytest.mark.parametrize("n", [1, 5])
def test_trap_19_squeezed_outputs(n: int) -> None:
    model, x, y = made(lambda m, x: m.layer(x).squeeze(), layer=nn.Linear(4, 1)), drawn(n, 4), drawn(n)
    assert_exact(model, x, y, [squares(model(x[i : i + 1]), y[i]) for i in range(n)])


def scaled(m: Any, x: Tensor) -> Tensor:
    """No layer gets the model's argument itself, and what looks like samples are the rows of the last weight."""
    return m.h(m.l(2 * x - 1).tanh())


def normalized(m: Any, x: Tensor) -> Tensor:
    return m.h(m.l(m.n(x - x.mean())).tanh())


def products(m: Any, x: Tensor) -> Tensor:
    return (x @ m.l.weight).tanh() @ m.h.weight


def summed(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("...i,ij->...j", torch.einsum("...i,ij->...j", x, m.l.weight).tanh(), m.h.weight)


def functional(m: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, m.l.weight, m.l.bias).tanh(), m.h.weight, m.h.bias)


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "autoencoder": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), (4,)),
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.Tanh(), nn.ConvTranspose1d(5, 4, 3)), (4, 6)),
    "images": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.ConvTranspose2d(5, 3, 3)), (3, 4, 4)),
    "scaled input": (lambda: made(scaled, l=nn.Linear(4, 5), h=nn.Linear(5, 4)), (4,)),
    "normalized input": (lambda: made(normalized, n=nn.LayerNorm(4), l=nn.Linear(4, 5), h=nn.Linear(5, 4)), (4,)),
    "normalized output": (
        lambda: made(scaled, l=nn.Linear(4, 5), h=nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))),
        (4,),
    ),
    "scaled images": (lambda: made(scaled, l=nn.Conv2d(3, 5, 3), h=nn.ConvTranspose2d(5, 3, 3)), (3, 4, 4)),
    "scaled logits": (lambda: nn.Sequential(made(scaled, l=nn.Linear(4, 5), h=nn.Linear(5, 4)), nn.Softmax(-1)), (4,)),
    "products": (lambda: made(products, l=nn.Linear(5, 4, bias=False), h=nn.Linear(4, 5, bias=False)), (4,)),
    "einsum": (lambda: made(summed, l=nn.Linear(5, 4, bias=False), h=nn.Linear(4, 5, bias=False)), (4,)),
    "functional layers": (lambda: made(functional, l=nn.Linear(4, 5), h=nn.Linear(5, 4)), (4,)),
    "cell": (lambda: made(lambda m, x: m.h(m.l(2 * x)), l=nn.GRUCell(4, 5), h=nn.Linear(5, 4)), (4,)),
    "lstm": (
        lambda: made(lambda m, x: m.l(x)[0].tanh(), l=nn.LSTM(4, 3, batch_first=True)),
        (5, 4),
    ),
    "attention": (
        lambda: made(lambda m, x: m.l(x, x, x)[0], l=nn.MultiheadAttention(4, 2, batch_first=True)),
        (5, 4),
    ),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_trap_19_a_model_that_is_called_on_one_sample_without_a_batch_axis(name: str) -> None:
    """As many outputs as inputs, or steps, are no samples."""
    make, shape = UNBATCHED[name]
    model, samples = randomized(make()).double(), drawn(N, *shape)
    with pytest.raises(ShapeError, match="without a batch axis"), FisherMonitor(model, "sum"):
        squares(model(samples[0]), 0.0).backward()
    expected = {row: t.sum() for row, t in looped(model, [squares(model(x[None]), 0.0) for x in samples]).items()}
    for words, given in (({"n_samples": 1}, samples), ({}, samples[:, None])):
        with FisherMonitor(model, "sum", **words) as monitor:
            for x in given:
                squares(model(x), 0.0).backward()
        assert monitor.n_samples == N
        for row, t in expected.items():
            found = torch.tensor(monitor.report().loc[row, "fisher_trace"])
            assert_equal(found, t, torch.stack(list(expected.values())).sum(), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
def test_trap_19_modules_that_the_model_calls_for_each_sample_have_no_batch_axis(n: int) -> None:
    """With as many steps as samples, or other numbers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(
            torch.stack([m.attention(h, h, h)[0] + m.recurrent(m.layer(row))[0] for row in x for h in (row,)])
        )

    parts = {"layer": nn.Linear(4, 4), "recurrent": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    model, x, y = made(forward, head=nn.Linear(4, 3), **parts), drawn(n, 5, 4), drawn(n, 5, 3)
    assert_exact(model, x, y, [squares(model(x[i : i + 1]), y[i : i + 1]) for i in range(n)])


class Decoder(nn.Module):
    """Each sample has a code of its own in a table, and what all of them share comes from a layer on a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.layer = nn.Parameter(torch.randn(6, 4)), nn.Linear(3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.codes[ids] * self.layer(torch.ones(3).double()).tanh()


def test_trap_19_samples_that_are_known_by_their_numbers_alone() -> None:
    model, ids, y = Decoder().double(), torch.tensor([4, 1, 0, 5, 1]), drawn(5, 4)
    assert_exact(model, ids, y, [squares(model(ids[i : i + 1]), y[i : i + 1]) for i in range(5)])


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 5])
def test_trap_19_units_without_a_gradient_in_modules_that_are_called_for_each_sample(n: int) -> None:
    """They fit any sample, and so do not say that the others are of several."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = [m.layer(row) for row in x]
        return torch.stack([m.yes(row).relu() if row.sum() > 0 else m.no(row).relu() - row for row in rows])

    for seed in range(4):
        torch.manual_seed(seed)
        model = made(forward, layer=nn.Linear(4, 4), yes=nn.Linear(4, 4), no=nn.Linear(4, 4))
        x, y = drawn(n, 4), drawn(n, 4)
        assert_exact(model, x, y, [squares(model(x[i : i + 1]), y[i : i + 1]) for i in range(n)])


# Rows that are no samples


@pytest.mark.parametrize("sample_of", ["tensor", "function"])
def test_trap_19_outputs_with_a_row_for_each_step(sample_of: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layer(x).tanh().cumsum(1).flatten(0, 1))

    model, x, y = made(forward, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)), drawn(N, T, 4), drawn(N * T, 3)
    alone = [squares(model(x[i : i + 1]), y[i * T : (i + 1) * T]) for i in range(N)]
    assert "sample_of=, the sample of each row" in refusal(model, x, y)
    words = {
        "tensor": torch.arange(N).repeat_interleave(T),
        "function": lambda x: torch.arange(len(x)).repeat_interleave(x.shape[1]),
    }
    assert_exact(model, x, y, alone, sample_of=words[sample_of])
    with pytest.raises(UnsupportedError, match="on an axis of their own"):
        fisher_report(model, None, (x, None), fisher="exact", sample_of=words["tensor"], progress=False)


def triplets(outputs: Tensor, targets: Any) -> Tensor:
    """The anchors of all samples come first, then what is near them, then what is far."""
    return nn.functional.triplet_margin_loss(*outputs.chunk(3), margin=5.0, reduction="sum")


@pytest.mark.parametrize("few", [False, True], ids=["", "checked on three samples"])
@pytest.mark.parametrize("order", [range(N), [3, 0, 4, 1, 2]], ids=["in order", "in another"])
def test_trap_19_halves_of_a_batch(order: Sequence[int], few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that takes the parts of a batch apart is given some samples in parts, too."""
    if few:
        monkeypatch.setattr(separable_loss, "CHEAP", 1)
    model, x = made(lambda m, x: m.layer(x).tanh(), layer=nn.Linear(4, 3)), drawn(3 * N, 4)
    sample = torch.tensor(order).repeat(3)
    alone = [triplets(model(x[sample == n]), None) for n in range(N)]
    assert_exact(model, x, None, alone, triplets, sample_of=lambda x: sample)


def test_trap_19_rows_that_no_output_has() -> None:
    model, x, y = made(lambda m, x: m.layer(x), layer=nn.Linear(4, 3)), drawn(2 * N, 4), drawn(2 * N, 3)
    words = "sample_of says of 7 rows"
    assert words in refusal(model, x, y, sample_of=torch.arange(N).repeat(2)[:7])
    alone = [squares(model(x[n::N]), y[n::N]) for n in range(N)]
    assert_exact(model, x, y, alone, sample_of=torch.arange(N).repeat(2))


class Graphs(nn.Module):
    """Messages along edges, for nodes or for whole graphs."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled, self.message, self.norm, self.head = pooled, nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = self.norm(x + torch.zeros_like(x).index_add(0, edges[1], self.message(x)[edges[0]].tanh())) * self.scale
        if self.pooled:
            h = x.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, h.tanh())
        return self.head(h)


# Graphs of different sizes; then others with as many nodes, which would be equal blocks; then as many nodes as graphs.
BATCHES = [[3, 5, 4], [4, 4, 4], [6, 1, 5], [1, 1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [True, False], ids=["graphs", "nodes"])
def test_trap_19_graphs_in_mini_batches(pooled: bool) -> None:
    model = randomized(Graphs(pooled)).double()
    for sizes in BATCHES:
        graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        own = [torch.randint(size, (2, 2 * size)) for size in sizes]
        edges = torch.cat([e + start for e, start in zip(own, starts, strict=True)], 1)
        x, y = drawn(sum(sizes), 4), drawn(len(sizes) if pooled else sum(sizes), 2)
        alone = [
            squares(
                model(x[start : start + size], e, torch.zeros(size).long()),
                y[i : i + 1] if pooled else y[start : start + size],
            )
            for i, (size, start, e) in enumerate(zip(sizes, starts, own, strict=True))
        ]
        for words in ({"sample_of": "graph"}, {"sample_of": 2}, {"sample_of": lambda x, edges, graph: graph}):
            assert_exact(model, (x, edges, graph), y, alone, **words)
        if pooled:
            assert_exact(model, (x, edges, graph), y, alone, n_samples=len(sizes))
            assert_exact(model, (x, edges, graph), y, alone, n_samples=lambda x, edges, graph: graph.max() + 1)


def test_trap_19_graphs_whose_number_nothing_says() -> None:
    model = randomized(Graphs(True)).double()
    graph = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    message = refusal(model, (drawn(9, 4), torch.randint(9, (2, 5)), graph), drawn(3, 2))
    assert "its 9 samples (axis 0 of input 0, shape (9, 4))" in message
    assert "if there are 3 samples, pass n_samples=" in message


def test_trap_19_samples_without_a_row_leave_it_open_what_rows_are() -> None:
    model = randomized(Graphs(False)).double()
    graph, edges = torch.tensor([0, 0, 2]), torch.tensor([[0], [1]])
    with (
        FisherMonitor(model, sample_of=2, n_samples=3),
        pytest.raises(ShapeError, match=r"samples without a row.*leave such samples out"),
    ):
        model(drawn(3, 4), edges, graph)
    # So does a second number: there are three rows, and four samples.
    x, y = drawn(3, 4), drawn(3, 2)
    with FisherMonitor(model, "sum", sample_of=2, n_samples=4, per_sample=True) as monitor:
        squares(model(x, edges, graph), y).backward()
    assert monitor.n_samples == 4
    assert float(monitor.per_sample.iloc[[1, 3]].to_numpy().max()) == 0


def test_trap_19_bags_of_different_sizes() -> None:
    model = made(lambda m, ids, offsets: m.head(m.bag(ids, offsets)), bag=nn.EmbeddingBag(9, 4), head=nn.Linear(4, 3))
    for starts in ([0, 3, 4, 8, 9], [0, 1, 2, 3, 4]):
        ids, ends, y = torch.randint(9, (11,)), [*starts[1:], 11], drawn(N, 3)
        alone = [
            squares(model(ids[a:b], torch.tensor([0])), y[i : i + 1])
            for i, (a, b) in enumerate(zip(starts, ends, strict=True))
        ]
        assert_exact(model, (ids, torch.tensor(starts)), y, alone)


# Packed sequences

RESULTS: dict[str, Callable[[Any, PackedSequence], Tensor]] = {
    "rows": lambda m, packed: m.head(packed.data),
    "rows of the layer": lambda m, packed: m.head(m.rnn(packed)[0].data),
    "padded": lambda m, packed: m.head(pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0]),
    "last": lambda m, packed: m.head(m.rnn(packed)[1][-1]),
}


@pytest.mark.parametrize("lengths", [(4, 3, 3, 1), (3, 1, 4, 3), (2, 2, 2, 2), (1, 1, 1, 1), (4,)], ids=str)
@pytest.mark.parametrize("result", RESULTS)
def test_trap_19_packed_sequences(result: str, lengths: tuple[int, ...]) -> None:
    model = made(RESULTS[result], rnn=nn.GRU(4, 4), head=nn.Linear(4, 3))
    sequences = [drawn(length, 4) for length in lengths]
    alone = [model(pack_sequence([sequence])).square().sum() for sequence in sequences]
    packed = pack_sequence(sequences, enforce_sorted=False)

    def loss(outputs: Tensor, lengths: Tensor) -> Tensor:
        if outputs.dim() < 3:
            return outputs.square().sum()
        kept = torch.arange(outputs.shape[1]) < lengths[:, None]
        return (outputs.square() * kept[..., None]).sum()

    assert_exact(model, packed, torch.tensor(lengths), alone, loss)


def test_trap_19_packed_sequences_through_an_lstm() -> None:
    model = made(
        lambda m, packed: m.head(m.rnn(packed)[1][0][-1]),
        rnn=nn.LSTM(4, 5, 2, bidirectional=True),
        head=nn.Linear(5, 3),
    )
    sequences = [drawn(length, 4) for length in (3, 1, 4, 3)]
    alone = [squares(model(pack_sequence([sequence])), 0.5) for sequence in sequences]
    assert_exact(model, pack_sequence(sequences, enforce_sorted=False), 0.5, alone)


# Lists, and fields in another order


def test_trap_19_a_list_with_an_item_for_each_sample() -> None:
    taken = made(lambda m, xs: torch.stack([m.layer(x).tanh().mean(0) for x in xs]), layer=nn.Linear(4, 3))
    xs, y = [drawn(k, 4) for k in (3, 2, 4, 3)], drawn(4, 3)
    alone = [squares(taken([x]), y[i : i + 1]) for i, x in enumerate(xs)]
    assert_exact(taken, (xs,), y, alone, **remedy(refusal(taken, (xs,), y)))
    returned = made(lambda m, x: [row.tanh() for row in m.layer(x).flatten(1)], layer=nn.Linear(4, 4))

    def loss(outputs: list[Tensor], targets: None) -> Tensor:
        return torch.stack([row.square().sum() for row in outputs]).sum()

    x = drawn(N, T, 4)
    alone = [loss(returned(x[i : i + 1]), None) for i in range(N)]
    assert_exact(returned, x, None, alone, loss, **remedy(refusal(returned, x, None, loss)))


def test_trap_19_a_list_of_rows_beside_the_outputs() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = m.layer(x)
        return y, list(y)

    model, x = made(forward, layer=nn.Linear(4, 3)), drawn(N, 4)
    for place in (0, 1):

        def loss(outputs: tuple[Tensor, list[Tensor]], targets: None, place: int = place) -> Tensor:
            return torch.stack([row.square().sum() for row in outputs[place]]).sum()

        alone = [loss(model(x[i : i + 1]), None) for i in range(N)]
        assert_exact(model, x, None, alone, loss, batch_axis={"outputs": {1: "list"}})
        if not place:
            assert_exact(model, x, None, alone, loss)
    with pytest.raises(CurvatureError, match=re.escape("batch_axis={'outputs': {1: 'list'}}")):
        fisher_report(model, loss, (x, None), progress=False)


def test_trap_19_outputs_that_are_computed_from_other_outputs() -> None:
    """What the loss gets through the later ones counts once in a check of one sample."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = m.one(x)
        second = m.two(first.tanh())
        return first, second, second.sum(-1)

    model, x = made(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 3)), drawn(N, 4)

    def loss(outputs: tuple[Tensor, Tensor, Tensor], targets: None) -> Tensor:
        return outputs[0].square().sum() + outputs[1].exp().sum() + outputs[2].square().sum()

    assert_exact(model, x, None, [loss(model(x[i : i + 1]), None) for i in range(N)], loss)


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """A mapping whose keys are also fields, as a well-known library's outputs are."""

    last: Any = None
    pooled: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("last", "pooled", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def test_trap_19_a_field_that_is_set_after_a_later_one() -> None:
    def forward(m: Any, x: Tensor) -> Output:
        found = Output(last=m.one(x), hidden=(m.two(x),))
        found.pooled = found["pooled"] = m.one(x).sum(-1)
        return found

    model, x = made(forward, one=nn.Linear(4, 3), two=nn.Linear(4, 5)), drawn(N, 4)

    def loss(outputs: Output, targets: None) -> Tensor:
        return outputs["pooled"].square().sum() + outputs["hidden"][0].exp().sum()

    assert_exact(model, x, None, [loss(model(x[i : i + 1]), None) for i in range(N)], loss)


def test_trap_19_numbers_that_are_no_count() -> None:
    """Documents have identifiers, of which the largest says nothing of how many there are: 8 samples were 3."""
    model, x, y = (
        made(lambda m, x: m.head(m.layer(x).tanh()), layer=nn.Linear(4, 4), head=nn.Linear(4, 3)),
        drawn(6, 4),
        drawn(6, 3),
    )
    document = torch.tensor([7, 7, 2, 5, 2, 7])
    for run in (
        lambda: monitored(model, x, y, squares, False, sample_of=document),
        lambda: fisher_report(model, squares, (x, y), sample_of=document, progress=False),
        lambda: empirical_fisher_trace(model, squares, x, y, sample_of=document),
    ):
        with pytest.raises(
            ArgumentError, match=r"3 different numbers, the largest of which is 7.*return_inverse.*n_samples=8"
        ):
            run()
    alone = [squares(model(x[document == number]), y[document == number]) for number in (2, 5, 7)]
    assert_exact(model, x, y, alone, sample_of=torch.unique(document, return_inverse=True)[1])
    rows = [document == number for number in range(8)]  # Most have none, and count.
    assert_exact(model, x, y, [squares(model(x[own]), y[own]) for own in rows], sample_of=document, n_samples=8)


@pytest.mark.parametrize("modules", [{"*": 0, "turned": 1}, {"head": 0, "turned": 0, "turn*": 1}], ids=str)
def test_trap_19_of_several_patterns_the_last_counts(modules: dict[str, int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.turned(x.transpose(0, 1)).tanh().transpose(0, 1))

    model, x, y = made(forward, turned=nn.Linear(4, 4), head=nn.Linear(4, 3)), drawn(N, N, 4), drawn(N, N, 3)
    shown: dict[nn.Module, Tensor] = {}

    def show(module: nn.Module, output: Tensor, gradient: Tensor) -> None:
        shown[module] = output

    assert_exact(
        model, x, y, [squares(model(x[i : i + 1]), y[i : i + 1]) for i in range(N)], batch_axis={"modules": modules}
    )
    with FisherMonitor(model, "sum", on_output=show, batch_axis={"modules": modules}):
        squares(model(x), y).backward()
    torch.testing.assert_close(shown[model.turned], model.turned(x))


# Words that mean nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": lambda x, edges, graph: -1}, "n_samples"),
        ({"sample_of": 2.5}, "sample_of must be"),
        ({"sample_of": True}, "sample_of must be"),
        ({"sample_of": "batch"}, "sample_of='batch' names no argument"),
        ({"sample_of": 0}, "sample_of must give the number of a sample"),
        ({"sample_of": torch.tensor([-1, 0, 1])}, "sample_of must give the number of a sample"),
        ({"sample_of": 2, "n_samples": 2}, "rows of 3 samples, and n_samples is 2"),
        ({"batch_axis": {"inputs": {0: 0, "edges": 1}}}, "count different numbers of samples"),
    ],
    ids=range(9),
)
def test_trap_19_words_that_mean_nothing(words: dict[str, Any], message: str) -> None:
    model, graph = randomized(Graphs(False)).double(), torch.tensor([0, 1, 2, 2])
    with pytest.raises((ArgumentError, ShapeError), match=message):
        monitored(model, (drawn(4, 4), torch.randint(4, (2, 7)), graph), 0.0, squares, False, **words)


class StepsInFront(nn.Module):
    """A model that takes ``[n, channels, steps]`` and returns ``[steps, n, classes]``, as losses of CTC want it."""

    def __init__(self, first: nn.Module, channels: int):
        super().__init__()
        self.first, self.head = first, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2) if isinstance(self.first, nn.Linear) else x
        h = self.first(h).tanh()
        return self.head(h if isinstance(self.first, nn.Linear) else h.transpose(1, 2)).transpose(0, 1)


FIRST_LAYERS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "convolution": lambda: (nn.Conv1d(3, 6, 3, padding=1), 6),
    "as many channels as samples": lambda: (nn.Conv1d(3, 5, 1, bias=False), 5),
    "group norm": lambda: (nn.GroupNorm(1, 3), 3),
    "batch norm": lambda: (nn.BatchNorm1d(3).eval(), 3),
    "linear": lambda: (nn.Linear(3, 6), 6),
}


@pytest.mark.parametrize("driver", ["monitor", "gates"])
@pytest.mark.parametrize("first", FIRST_LAYERS)
def test_trap_19_as_many_steps_in_front_of_the_outputs_as_samples(first: str, driver: str) -> None:
    """The layers that know their samples' axis contradict the outputs. What the message says to pass is exact."""
    model = StepsInFront(*FIRST_LAYERS[first]()).double()
    x, channels = torch.randn(5, 3, 5).double(), isinstance(model.first, nn.Linear)

    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().sum()

    def watched(**options: Any) -> FisherMonitor | Gates:
        watch: Any = (
            FisherMonitor if driver == "monitor" else partial(Gates, modules={"first": {"axis": -1 if channels else 1}})
        )
        with watch(model, reduction="sum", **options) as found:
            loss(model(x)).backward()
        return found

    with expectation(r"batch_axis={'outputs': 1}"):
        watched()
    found = watched(batch_axis={"outputs": 1})
    assert found.n_samples == 5
    if isinstance(found, FisherMonitor):
        for name, p in model.named_parameters():
            rows = [torch.autograd.grad(loss(model(x[n : n + 1])), p)[0] for n in range(5)]
            torch.testing.assert_close(
                float(found.report().fisher_trace[name]),
                float(torch.stack(rows).square().sum()),
                rtol=1e-10,
                atol=1e-20,
            )
        return
    squares = torch.zeros(len(found.fisher["first"])).double()
    for n in range(5):
        outputs = model.first(x[n : n + 1].transpose(1, 2) if channels else x[n : n + 1])
        mask = torch.ones(len(squares), dtype=torch.float64, requires_grad=True)
        gated = (outputs * (mask if channels else mask[:, None])).tanh()
        (g,) = torch.autograd.grad(loss(model.head(gated if channels else gated.transpose(1, 2))), mask)
        squares += g.square() / 5
    torch.testing.assert_close(found.fisher["first"], squares, rtol=1e-10, atol=1e-20)


class Spiking(nn.Module):
    """A layer that charges a membrane in each of five steps, which are stacked in front of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        membrane, outputs = torch.zeros(len(x), 6, dtype=x.dtype), []
        for _ in range(5):
            membrane = 0.9 * membrane + self.first(x)
            spikes = torch.sigmoid(membrane - 1)
            membrane = membrane - spikes
            outputs.append(self.head(spikes))
        return torch.stack(outputs)


class Blended(nn.Module):
    """A model that mixes its samples with one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h + h.flip(0) / 3)


def test_trap_19_as_many_spiking_steps_in_front_as_samples() -> None:
    """A layer on the samples leads to all steps. Both things that the message says to do are exact."""
    model, x = Spiking().double(), torch.randn(5, 3).double()
    with expectation(r"Linear 'first'.*it takes all of.*batch_axis={'outputs': 1}"), FisherMonitor(model, "sum"):
        model(x).square().sum().backward()
    with FisherMonitor(model, "sum", batch_axis={"outputs": 1}) as monitor:
        model(x).square().sum().backward()
    found = looped(model, [model(x[n : n + 1]).square().sum() for n in range(5)])
    for name, t in found.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.sum(), monitor.trace, torch.float64)
    mixing, x = Blended().double(), torch.randn(5, 5, 3).double()
    with (
        expectation(r"Linear 'first'.*mixes or sorts its samples, pass batch_axis={'outputs': 0}"),
        FisherMonitor(mixing, "sum"),
    ):
        mixing(x).square().sum().backward()
    for batch_axis in ({"outputs": 0}, {"outputs": {0: 0}}, 0):
        with FisherMonitor(mixing, "sum", batch_axis=batch_axis) as monitor:
            mixing(x).square().sum().backward()
        found = looped(mixing, [row.square().sum() for row in mixing(x)])
        for name, t in found.items():
            assert_equal(
                torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.sum(), monitor.trace, torch.float64
            )


ONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Loss, Tensor]] = {
    "a class": (lambda: nn.Linear(5, 3), (5,), nn.functional.cross_entropy, torch.tensor(1)),
    "as many features as classes": (lambda: nn.Linear(3, 3), (3,), nn.functional.cross_entropy, torch.tensor(1)),
    "numbers": (lambda: nn.Linear(5, 3), (5,), nn.functional.mse_loss, torch.randn(3).double()),
    "a sum": (lambda: nn.Linear(5, 3), (5,), squares, torch.randn(3).double()),
    "an axis that the loss adds": (
        lambda: nn.Linear(5, 3),
        (5,),
        lambda outputs, targets: nn.functional.cross_entropy(outputs[None], targets),
        torch.tensor([1]),
    ),
    "a number": (lambda: nn.Linear(5, 1), (5,), nn.functional.mse_loss, torch.randn(1).double()),
    "steps": (lambda: nn.Linear(5, 3), (6, 5), nn.functional.cross_entropy, torch.arange(6) % 3),
}


@pytest.mark.parametrize("name", ONE)
def test_trap_19_one_sample_without_an_axis(name: str) -> None:
    """By the user's word everything belongs to it, in the functions as in a monitor."""
    made, shape, loss_fn, y = ONE[name]
    y = y.to(torch.empty(0).device)  # Torch 2.8 knows no default device once another was taken back.
    model, x = (
        randomized(nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Tanh(), made())).double(),
        torch.randn(shape).double(),
    )
    expected = torch.stack([t.sum() for t in looped(model, [loss_fn(model(x), y)]).values()]).sum()
    with FisherMonitor(model, n_samples=1) as monitor:
        loss_fn(model(x), y).backward()
    reported = fisher_report(model, loss_fn, [(x, y)], n_samples=1, progress=False)["fisher_trace"].sum()
    found = [
        empirical_fisher_trace(model, loss_fn, x, y, n_samples=1, create_graph=graph, verify=verify)
        for graph in (False, True)
        for verify in (True, False)
    ]
    for one in (monitor.trace, torch.tensor(reported), *found):
        assert_equal(one, expected, expected)


@pytest.mark.parametrize("ids", [[1, 2, 5], [5, 0, 3]])
def test_trap_19_as_many_ids_as_bags(ids: list[int]) -> None:
    """The ids are taken for samples, as the offsets are, which a sample alone shows; the remedy of that refusal is exact."""

    def forward(m: Any, ids: Tensor, offsets: Tensor) -> Tensor:
        return m.head(m.bag(ids, offsets))

    model = Forward(forward, bag=nn.EmbeddingBag(6, 3, mode="sum"), head=nn.Linear(3, 3)).double()
    x, y, loss_fn = (torch.tensor(ids), torch.tensor([0, 1, 2])), torch.arange(3), nn.functional.cross_entropy
    expected = sum(t.sum() for t in looped(model, list(loss_fn(model(*x), y, reduction="none"))).values()) / 3
    with pytest.raises(CurvatureError, match=r"n_samples= where rows are no samples, as the ids of bags"):
        empirical_fisher_trace(model, loss_fn, x, y)
    for found in (
        empirical_fisher_trace(model, loss_fn, x, y, n_samples=3),
        empirical_fisher_trace(model, loss_fn, x, y, verify=False),
    ):
        assert_equal(found, expected, expected)
