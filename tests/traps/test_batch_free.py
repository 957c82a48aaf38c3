"""Traps 4, 17 and 18: what has no batch axis, what has one of its own, and what gets no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CoupledSamplesError, CoverageError, CurvatureError, ShapeError, VerificationError
from traps.exactness import assert_exact, drawn, numbers

Make = Callable[[], nn.Module]


def made(forward: Callable[..., Any], buffers: dict[str, Tensor] | None = None, **parts: Any) -> nn.Module:
    """A model of modules and of raw parameters, which tensors stand for."""
    model = Forward(forward, **{name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    for name, part in parts.items():
        if isinstance(part, Tensor):
            setattr(model, name, nn.Parameter(part))
    for name, value in (buffers or {}).items():
        model.register_buffer(name, value)
    return model


# 4. A batch-free chain through as many layers as there are


def position_bias(self: Any, x: Tensor) -> Tensor:
    """Swin v2's: an MLP on a table of relative positions, read in some order."""
    table = self.mlp(self.table).view(-1, 1)[self.index.view(-1)].view(3, 3, -1).permute(2, 0, 1)
    return (torch.softmax(x @ x.transpose(1, 2) + 16 * torch.sigmoid(table), -1) @ self.layer(x)).flatten(1)


def relative_embeddings(self: Any, x: Tensor) -> Tensor:
    """DeBERTa v3's: normed, and through a layer that the samples go through as well."""
    relative = self.norm(self.relative.weight)
    return (torch.softmax(self.query(x) @ self.key(relative).T, -1) @ self.key(relative)).flatten(1)


def unbatched_start(self: Any, x: Tensor) -> Tensor:
    start = self.projection(self.start)[None, None].expand(len(x), 1, -1)
    return torch.cat([start, self.layer(x)], 1).flatten(1)


def normed_positions(self: Any, x: Tensor) -> Tensor:
    return self.head((x + self.norm(self.positions(torch.arange(3)))).tanh().mean(1))


def a_whole_network(self: Any, x: Tensor) -> Tensor:
    prompts = self.second(self.first(self.prompts).relu())
    return self.head(torch.cat([prompts.expand(len(x), -1, -1), x], 1).tanh().mean(1))


def one_layer_twice(self: Any, x: Tensor) -> Tensor:
    """On numbers that all samples share, and on what it made of them: the second call's way leads through the first one."""
    shared = self.layer(self.numbers)
    return self.head((x + self.layer(shared.tanh()) * shared).tanh().mean(1))


BATCH_FREE: dict[str, Make] = {
    "a position bias": lambda: made(
        position_bias,
        {"table": torch.randn(1, 3, 3, 2), "index": torch.randint(9, (9,))},
        layer=nn.Linear(4, 4),
        mlp=nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1, bias=False)),
    ),
    "relative embeddings": lambda: made(
        relative_embeddings,
        query=nn.Linear(4, 4),
        key=nn.Linear(4, 4),
        norm=nn.LayerNorm(4),
        relative=nn.Embedding(6, 4),
    ),
    "an unbatched start": lambda: made(
        unbatched_start, layer=nn.Linear(4, 4), projection=nn.Linear(4, 4), start=torch.randn(4)
    ),
    "normed positions": lambda: made(
        normed_positions, positions=nn.Embedding(3, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 3)
    ),
    "a whole network": lambda: made(
        a_whole_network, prompts=torch.randn(2, 4), first=nn.Linear(4, 5), second=nn.Linear(5, 4), head=nn.Linear(4, 3)
    ),
    "one layer twice": lambda: made(
        one_layer_twice, {"numbers": torch.randn(3, 4)}, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("n", [1, 3, 5])  # three are as many as there are steps
@pytest.mark.parametrize("name", BATCH_FREE)
def test_trap_04_layers_without_a_batch_axis(name: str, n: int) -> None:
    model, x, y = drawn(BATCH_FREE[name](), n, 3, 4)
    assert_exact(model, x, y)
    everything = torch.tensor(fisher_report(model, numbers, (x, y), progress=False)["fisher_trace"].sum())
    for create_graph in (False, True):
        found = empirical_fisher_trace(model, numbers, x, y, create_graph=create_graph)
        assert_equal(found.detach(), everything, everything, torch.float64)


def test_trap_04_frozen_layers_in_the_chain_are_refused() -> None:
    """Their parameters are in no graph; the report, which turns gradients on, is exact."""
    model, x, y = drawn(BATCH_FREE["a whole network"](), 5, 3, 4)
    model.second.bias.requires_grad_(False)
    with (
        pytest.raises(CoverageError, match=r"second\.bias: frozen, in a layer that has no batch axis"),
        FisherMonitor(model, parameters="all"),
    ):
        numbers(model(x), y).backward()
    report = fisher_report(model, numbers, (x, y), progress=False, parameters="all")
    model.second.bias.requires_grad_(True)
    right = fisher_report(model, numbers, (x, y), progress=False)
    assert report.loc["second.bias", "fisher_trace"] == pytest.approx(
        right.loc["second.bias", "fisher_trace"], rel=1e-8
    )


def frames(self: Any, x: Tensor) -> Tensor:
    """TimeSformer: a class token for each frame, of which the first samples' rows are kept."""
    n, count, _ = x.shape
    h = self.projection(x.reshape(n * count, 1, 4))
    h = torch.cat([self.token.expand(n * count, -1, -1), h], 1) + self.positions
    token, h = h[:n, 0, :].unsqueeze(1), h[:, 1:].reshape(n, count, 4)
    return torch.cat([token, h + self.times], 1).flatten(1)


def windows(self: Any, x: Tensor) -> Tensor:
    """RF-DETR: windows in the batch, and a class token for each, repeated in another order."""
    n = len(x)
    h = torch.cat([self.token.expand(n, -1, -1), self.projection(x)], 1) + self.positions
    h = torch.cat([h[:, :1].repeat(2, 1, 1), h[:, 1:].reshape(n * 2, -1, 4)], 1)
    return self.layer(h).tanh().reshape(n, -1)


MIXTURES: dict[str, tuple[Make, int]] = {
    "frames": (
        lambda: made(
            frames,
            projection=nn.Linear(4, 4),
            token=torch.randn(1, 1, 4),
            positions=torch.randn(1, 2, 4),
            times=torch.randn(1, 2, 4),
        ),
        2,
    ),
    "windows": (
        lambda: made(
            windows,
            projection=nn.Linear(4, 4),
            layer=nn.Linear(4, 4),
            token=torch.randn(1, 1, 4),
            positions=torch.randn(1, 5, 4),
        ),
        4,
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_trap_04_a_mixture_is_not_counted_twice(name: str) -> None:
    """Some rows are one sample's, others several samples': what lies upstream has uses of its own."""
    make, steps = MIXTURES[name]
    assert_exact(*drawn(make(), 5, steps, 4))


# 17. A batch axis of a module's own


def recurrent(self: Any, x: Tensor) -> Tensor:
    return self.head(self.module(x)[0].tanh())


def attending(self: Any, x: Tensor) -> Tensor:
    later = torch.triu(torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype), 1)
    return self.head(self.module(x, x, x, attn_mask=later)[0].tanh())


def encoding(self: Any, x: Tensor) -> Tensor:
    later = torch.triu(torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype), 1)
    return self.head(self.module(x, src_mask=later).tanh())


STEPS_FIRST: dict[str, Make] = {
    "LSTM": lambda: made(recurrent, module=nn.LSTM(4, 4), head=nn.Linear(4, 2)),
    "GRU": lambda: made(recurrent, module=nn.GRU(4, 4), head=nn.Linear(4, 2)),
    "RNN": lambda: made(recurrent, module=nn.RNN(4, 4), head=nn.Linear(4, 2)),
    "MultiheadAttention": lambda: made(attending, module=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 2)),
    "TransformerEncoderLayer": lambda: made(
        encoding, module=nn.TransformerEncoderLayer(4, 2, 8, 0.0), head=nn.Linear(4, 2)
    ),
}


def steps_first(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum((0, 2)).mean()


@pytest.mark.parametrize(("steps", "n"), [(5, 3), (4, 4), (6, 3)])
@pytest.mark.parametrize("name", STEPS_FIRST)
def test_trap_17_steps_are_not_samples(name: str, steps: int, n: int) -> None:
    model, x, y = drawn(STEPS_FIRST[name](), steps, n, 4)
    assert_asks_for_batch_axis(model, x, y, r"has its batch on axis 1 \(batch_first=False\).*pass batch_axis=1")


def assert_asks_for_batch_axis(model: nn.Module, x: Tensor, y: Tensor, text: str) -> None:
    """Every way of analyzing a model with the steps in front is refused with a text, and exact with ``batch_axis=1``."""
    n = x.shape[1]
    ways: list[Callable[..., Any]] = [
        lambda **options: watched(model, x, y, **options),
        lambda **options: fisher_report(model, steps_first, (x, y), progress=False, **options)["fisher_trace"].sum(),
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        loss = steps_first(model(x[:, i : i + 1]), y[:, i : i + 1])
        expected += sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))) / n
    for way in ways:
        with pytest.raises(ShapeError, match=text):
            way()
        found = torch.tensor(float(way(batch_axis=1)), dtype=torch.float64)
        assert_equal(found, expected, expected, torch.float64)


def watched(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    with FisherMonitor(model, **options) as monitor:
        steps_first(model(x), y).backward()
    return monitor.trace


def attending_to_support(self: Any, x: Tensor) -> Tensor:
    """Samples first, and a support set that all of them attend to, which is another number of samples."""
    support = self.module(self.support, self.support, self.support)[0]
    return self.head(x @ support[:, 0].T)


def test_trap_17_a_support_set_has_no_samples() -> None:
    model = made(
        attending_to_support,
        {"support": torch.randn(5, 1, 4)},
        module=nn.MultiheadAttention(4, 2),
        head=nn.Linear(5, 3),
    )
    for n in (4, 5):
        assert_exact(*drawn(model, n, 4))


def test_trap_17_queries_and_keys_of_different_lengths() -> None:
    model = made(lambda self, q, k: self.module(q, k, k)[0], module=nn.MultiheadAttention(8, 2)).double()
    q, k = torch.randn(4, 3, 8).double(), torch.randn(5, 3, 8).double()
    with pytest.raises(ShapeError, match="pass batch_axis=1"), FisherMonitor(model):
        steps_first(model(q, k), torch.zeros(4, 3, 8)).backward()
    with pytest.raises(CurvatureError, match="pass batch_axis=1"):
        empirical_fisher_trace(model, steps_first, (q, k), torch.zeros(4, 3, 8).double())


@pytest.mark.parametrize(
    "operation",
    [
        lambda h: h.cumsum(0),
        lambda h: (1 + 0.1 * h).cumprod(-3),
        lambda h: h.cummax(0)[0],
        lambda h: h.cummin(0)[0],
        lambda h: h.logcumsumexp(0),
    ],
    ids=["sum", "product", "maximum", "minimum", "logsumexp"],
)
def test_trap_17_what_is_carried_from_step_to_step_contradicts_at_once(operation: Callable[[Tensor], Tensor]) -> None:
    model = made(
        lambda self, x: self.head(operation(self.layer(x)).tanh()), layer=nn.Linear(4, 4), head=nn.Linear(4, 2)
    )
    model, x, y = drawn(model, 5, 3, 4)
    with pytest.raises(ShapeError, match="carries something along axis 0"), FisherMonitor(model):
        steps_first(model(x), y).backward()
    with pytest.raises(CurvatureError, match="carries something along axis 0"):
        fisher_report(model, steps_first, (x, y), progress=False)


def fused_attention(self: Any, x: Tensor) -> Tensor:
    heads = self.layer(x).unflatten(-1, (2, 4)).permute(1, 2, 0, 3)
    h = F.scaled_dot_product_attention(heads, heads, heads, is_causal=self.causal)
    return self.head(h.permute(2, 0, 1, 3).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("steps", "n"), [(5, 3), (4, 4), (3, 5), (6, 1)])
def test_trap_17_positions_of_fused_attention_are_no_samples(steps: int, n: int, causal: bool) -> None:
    """Of a model with the steps in front that is written without torch's own layers."""
    model = made(fused_attention, layer=nn.Linear(4, 8), head=nn.Linear(8, 2))
    model.causal = causal
    model, x, y = drawn(model, steps, n, 4)
    assert_asks_for_batch_axis(model, x, y, r"carries something along axis 2 .*pass batch_axis=")


@pytest.mark.parametrize("n", [1, 3])
def test_trap_17_positions_that_attend_to_other_steps_are_no_samples(n: int) -> None:
    """As many queries as the first axis has, with keys of another length: each stands for a step, not for a sample."""

    def forward(self: Any, x: Tensor, memory: Tensor) -> Tensor:
        q, k = (layer(z).unflatten(-1, (2, 4)).permute(1, 2, 0, 3) for layer, z in ((self.q, x), (self.k, memory)))
        return self.head(F.scaled_dot_product_attention(q, k, k).permute(2, 0, 1, 3).flatten(2))

    model = made(forward, q=nn.Linear(4, 8), k=nn.Linear(4, 8), head=nn.Linear(8, 2)).double()
    x, memory = torch.randn(5, n, 4).double(), torch.randn(7, n, 4).double()
    with pytest.raises(ShapeError, match="carries something along axis 2"), FisherMonitor(model):
        model(x, memory).square().mean().backward()


def test_trap_17_fused_attention_over_as_many_positions_as_samples_is_exact() -> None:
    """Also where a block mask keeps the tokens of samples apart that stand in one row."""
    model = made(fused_attention, layer=nn.Linear(4, 8), head=nn.Linear(8, 2))
    model.causal = True
    turned = made(lambda self, x: self.of(x.transpose(0, 1)).transpose(0, 1).flatten(1), of=model)
    assert_exact(*drawn(turned, 5, 5, 4))

    def packed(self: Any, x: Tensor) -> Tensor:
        heads = self.layer(x.flatten(0, 1)).unflatten(-1, (2, 4)).transpose(0, 1)[None]
        samples = torch.arange(len(x)).repeat_interleave(x.shape[1])
        mask = samples[:, None] == samples
        h = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return self.head(h[0].transpose(0, 1).flatten(1)).unflatten(0, x.shape[:2]).flatten(1)

    assert_exact(*drawn(made(packed, layer=nn.Linear(4, 8), head=nn.Linear(8, 2)), 5, 5, 4))


def test_trap_17_a_sum_over_the_past_of_the_data_is_refused_by_the_functions() -> None:
    """Nothing in the graph tells a monitor, but samples alone tell the functions."""
    model = made(lambda self, x: self.head(self.layer(x.cumsum(0)).tanh()), layer=nn.Linear(4, 4), head=nn.Linear(4, 2))
    model, x, y = drawn(model, 5, 3, 4)
    with pytest.raises(VerificationError, match="either samples influence each other"):
        fisher_report(model, steps_first, (x, y), progress=False)


# 18. Where autograd has a gradient that is exactly zero, the number is 0; where it has another, it is that


def one_entry(self: Any, x: Tensor) -> Tensor:
    query = self.layer(x)
    return ((query @ self.weight).softmax(-1) * query).sum(1)


def attention_over_one_step(self: Any, x: Tensor) -> Tensor:
    h = x.reshape(-1, 1, 4)
    weights = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2), -1)
    return (weights @ self.value(h)).reshape(len(x), -1)


ZERO: dict[str, Make] = {
    "softmax over one entry": lambda: made(one_entry, layer=nn.Linear(4, 4), weight=torch.randn(4, 1)),
    "attention over one step": lambda: made(
        attention_over_one_step, query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4)
    ),
    "a closed gate": lambda: made(
        lambda self, x: self.head(x.mean(1)) + self.gate * self.layer(x).sum(1),
        head=nn.Linear(4, 4),
        layer=nn.Linear(4, 4),
        gate=torch.zeros(1),
    ),
    "a parameter without elements": lambda: made(
        lambda self, x: torch.cat([self.none.expand(len(x), -1, -1), self.layer(x)], 1).flatten(1),
        layer=nn.Linear(4, 4),
        none=torch.zeros(1, 0, 4),
    ),
}


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("name", ZERO)
def test_trap_18_a_gradient_that_is_exactly_zero(name: str, n: int) -> None:
    torch.manual_seed(0)
    model = ZERO[name]().double()  # as they are made: the gate is closed
    x = torch.randn(n, 3, 4).double()
    assert_exact(model, x, torch.randn_like(model(x)).detach())


def masked(self: Any, x: Tensor) -> Tensor:
    """A modality of which the first sample has nothing."""
    there = x.any(2, keepdim=True)
    return self.head((F.linear(x, self.weight).tanh() * there).mean(1)) + self.other(x.mean(1)) * 0.1


def test_trap_18_a_first_sample_that_is_masked() -> None:
    model = made(masked, weight=torch.randn(4, 4), head=nn.Linear(4, 3), other=nn.Linear(4, 3))
    model, x, y = drawn(model, 5, 3, 4)
    x[0] = 0
    assert_exact(model, x, y)


def test_trap_18_a_gate_that_opens_where_nothing_shows_the_samples() -> None:
    """The first pass finds zero; when there is a gradient, it is looked for again."""
    model = made(
        lambda self, x: self.head(x.mean(1)) + self.gate * self.layer(x.reshape(-1, 4)).view(len(x), 3, 4).sum(1),
        head=nn.Linear(4, 4),
        layer=nn.Linear(4, 4),
        gate=torch.zeros(1),
    )
    model = model.double()
    x = torch.randn(5, 3, 4).double()
    y = torch.randn(5, 4).double()
    with FisherMonitor(model) as monitor:
        for _ in range(4):
            numbers(model(x), y).backward()
        with torch.no_grad():
            model.gate.fill_(0.5)
        numbers(model(x), y).backward()  # the fifth graph of its kind is looked through
    assert monitor.report().loc["layer.weight", "fisher_trace"] > 0
    assert_exact(model, x, y)


def test_trap_18_outputs_that_compare_samples_are_refused() -> None:
    model = made(lambda self, x: (self.layer(x).T @ self.layer(x)).flatten()[: len(x)], layer=nn.Linear(4, 4)).double()
    x = torch.randn(5, 4).double()
    with pytest.raises(CoupledSamplesError, match="belongs to several samples at once"), FisherMonitor(model):
        model(x).square().sum().backward()


# 19. Outputs beside those that the loss uses


def compared(self: Any, x: Tensor) -> dict[str, Tensor]:
    """As CLIP returns it: the similarities of all samples, and what they are computed from."""
    a, b = F.normalize(self.first(x)), F.normalize(self.second(x))
    similar = self.scale.exp() * a @ b.T
    return {"similar": similar, "transposed": similar.T, "a": a, "b": b}


def comparing() -> tuple[nn.Module, Tensor]:
    model = made(compared, first=nn.Linear(4, 3), second=nn.Linear(4, 3), scale=torch.tensor([0.3]))
    return model.double(), torch.randn(5, 4).double()


def each_by_itself(outputs: dict[str, Tensor], _: object = None) -> Tensor:
    return ((outputs["a"] - 1).square().sum(1) + (outputs["b"] - 1).pow(4).sum(1)).mean()


def test_trap_19_an_output_that_compares_samples_says_nothing_about_others() -> None:
    model, x = comparing()
    losses = [each_by_itself(model(x[n : n + 1])) for n in range(len(x))]
    named = {name: p for name, p in model.named_parameters() if name != "scale"}
    grads = [torch.autograd.grad(loss, list(named.values())) for loss in losses]
    expected = {name: torch.stack([g[i].square().sum() for g in grads]).mean() for i, name in enumerate(named)}
    everything = torch.stack(list(expected.values())).sum()
    with FisherMonitor(model) as monitor:
        for _ in range(4):  # in the last of which nothing is looked for
            each_by_itself(model(x)).backward()
    report = fisher_report(model, each_by_itself, (x, None), progress=False)
    for found in (monitor.report(), report):
        for name, value in expected.items():
            got = torch.tensor(found.loc[name, "fisher_trace"])
            assert_equal(got, value, everything, torch.float64)


@pytest.mark.parametrize("before", [0, 3])
def test_trap_19_a_loss_of_it_is_refused(before: int) -> None:
    model, x = comparing()
    with FisherMonitor(model) as monitor:
        for _ in range(before):
            each_by_itself(model(x)).backward()
        with pytest.raises(CoupledSamplesError, match="an output of the model that compares samples"):
            (each_by_itself(model(x)) + F.cross_entropy(model(x)["similar"], torch.arange(5))).backward()
    assert monitor.n_samples == 5 * before
