"""Trap 29: shapes and kinds of tensors for which nothing but a crash had been foreseen."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, exact_fisher, total
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, generalized_fisher_trace, register_rule
from torch_secorder.errors import UnsupportedError, VerificationError
from torch_secorder.per_sample import Outer
from torch_secorder.rules import registry
from traps.exactness import assert_exact, drawn, numbers


class Holding(Forward):
    """A forward with parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *, parameters: dict[str, Tensor], **modules: nn.Module):
        super().__init__(function, **modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


# A parameter of a single number, of none, and one sample


def temperature(m: Any, x: Tensor) -> Tensor:
    return m.t.exp() * m.h(x)


def temperature_twice(m: Any, x: Tensor) -> Tensor:
    return m.h(x) / (m.t.square() + 1) + m.t.tanh()


def one_weight_of_unit_norm(m: Any, x: Tensor) -> Tensor:
    return m.h(x) + x[:, :1] * (m.t / m.w.norm())


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("forward", [temperature, temperature_twice, one_weight_of_unit_norm])
def test_trap_29_a_parameter_of_one_number_behind_functions(forward: Callable[..., Tensor], n: int) -> None:
    model = Holding(forward, parameters={"t": torch.tensor(0.7), "w": torch.ones(3)}, h=nn.Linear(4, 3))
    assert_exact(*drawn(model, n, 4))


def normalized(m: Any, x: Tensor) -> Tensor:
    return x @ (m.w / m.w.norm())


@pytest.mark.parametrize("n", [1, 5])
def test_trap_29_a_weight_over_its_norm(n: int) -> None:
    assert_exact(*drawn(Holding(normalized, parameters={"w": torch.ones(4, 3)}), n, 4))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("n", [1, 5])
def test_trap_29_parameters_and_layers_without_elements(n: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.h(x) + m.z.sum() + m.empty(x).sum(1, keepdim=True) + m.narrow(x[:, :0])

    empty, narrow = nn.Linear(4, 0), nn.Linear(0, 3)
    model = Holding(forward, parameters={"z": torch.zeros(0, 4)}, h=nn.Linear(4, 3), empty=empty, narrow=narrow)
    for _ in range(5):  # later passes put small calls together
        assert_exact(*drawn(model, n, 4))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 2, 3, 4)], ids=str)
def test_trap_29_layers_without_elements_over_positions(shape: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        words = m.words((x[..., 0] > 0).long()).sum(-1, keepdim=True)
        return m.h(x) + m.narrow(m.empty(x)) + words

    empty, narrow = nn.Linear(4, 0), nn.Linear(0, 3)
    model = Forward(forward, h=nn.Linear(4, 3), empty=empty, narrow=narrow, words=nn.Embedding(2, 0))
    model, x, y = drawn(model, *shape)
    assert_exact(model, x, y)
    assert_exact(model, x, y, report=False, diagonal=True)


# Outputs in containers


def test_trap_29_a_list_with_a_tensor_for_each_sample_among_the_outputs() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.l(x)
        return {"all": h, "each": list(h)}

    model, x, y = Forward(forward, l=nn.Linear(4, 3)).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    assert_exact(model, x, y, lambda outputs, targets: numbers(outputs["all"], targets))


@dataclasses.dataclass
class Output(collections.OrderedDict):  # type: ignore[type-arg]  # as the outputs of transformers' models are
    last: Any = None
    pooled: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None and len(self):
            self[name] = value


def test_trap_19_a_field_of_the_outputs_that_is_set_after_a_later_one() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        outputs = Output(last=m.a(x), hidden=(m.b(x),))
        outputs.pooled = m.a(x).sum(-1, keepdim=True)
        return outputs

    model = Forward(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 5)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 1).double()
    assert_exact(model, x, y, lambda outputs, targets: numbers(outputs["pooled"], targets))


# Sparse gradients


@pytest.mark.parametrize("n", [1, 5])
def test_trap_29_numbers_that_are_put_where_a_mask_of_one_axis_is(n: int) -> None:
    """A head for frequent words and one for rare ones, in another order in each batch."""

    def forward(m: Any, x: Tensor, rare: Tensor) -> Tensor:
        found = torch.zeros(len(x), dtype=x.dtype).masked_scatter(~rare, m.often(x[~rare])[:, 0])
        return found.masked_scatter(rare, m.seldom(x[rare])[:, 0])[:, None]

    model = Forward(forward, often=nn.Linear(4, 1), seldom=nn.Linear(4, 1)).double()
    for _ in range(3):
        x, rare, y = torch.randn(n, 4).double(), torch.randint(2, (n,)).bool(), torch.randn(n, 1).double()
        assert_exact(model, (x, rare), y)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_trap_29_a_sparse_matrix_of_learned_edges(n: int) -> None:
    """The graphs of a batch are one large graph; what arrives at its matrix is sparse, too."""

    def forward(m: Any, x: Tensor, edges: Tensor) -> Tensor:
        nodes, count = m.l(x).flatten(0, 1), len(x) * x.shape[1]
        ends = (edges + x.shape[1] * torch.arange(len(x))[:, None, None]).movedim(1, 0).flatten(1)
        weights = m.w(nodes[ends[0]] * nodes[ends[1]])[:, 0].tanh()
        matrix = torch.sparse_coo_tensor(ends, weights, (count, count), check_invariants=True)
        return m.h(torch.sparse.mm(matrix, nodes)).view_as(x)

    model = Forward(forward, l=nn.Linear(4, 4), w=nn.Linear(4, 1), h=nn.Linear(4, 4)).double()
    x, edges, y = torch.randn(n, 4, 4).double(), torch.randint(4, (n, 2, 6)), torch.randn(n, 4, 4).double()
    assert_exact(model, (x, edges), y)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0])
def test_trap_29_sparse_bags(mode: str, padding: int | None) -> None:
    bag = nn.EmbeddingBag(9, 4, mode=mode, sparse=mode != "max", padding_idx=padding)
    model, ids = nn.Sequential(bag, nn.Linear(4, 3)).double(), torch.randint(9, (5, 6))
    assert_exact(model, ids, torch.randn(5, 3).double())


# Convolutions


@pytest.mark.parametrize("padding", [0, 1, (0, 1), (1, 0), 2])
@pytest.mark.parametrize("stride", [2, (1, 2), (2, 1), 3])
def test_trap_29_frames_folded_into_the_batch_of_a_strided_convolution(padding: Any, stride: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        seen = m.c(x.flatten(0, 1)).tanh().mean((2, 3)).unflatten(0, x.shape[:2])
        return m.h(seen.mean(1))

    conv = nn.Conv2d(96, 96, 1, stride=stride, padding=padding)  # so many channels that the Gram form is the cheapest
    model, x, y = drawn(Forward(forward, c=conv, h=nn.Linear(96, 3)), 4, 2, 96, 2, 3)
    rule = assert_exact(model, x, y).report().loc["c.weight", "rule"]
    assert x.device.type != "cpu" or "gram" in str(rule)  # what is cheapest depends on the device


@pytest.mark.parametrize("loss_type", ["nll", "mse"])
def test_trap_29_the_node_of_a_group_norm(loss_type: str) -> None:
    model, x, _ = drawn(nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)), 5, 4)
    expected = total(exact_fisher(model, x, loss_type=loss_type)) / len(x)
    assert_equal(generalized_fisher_trace(model, model(x), None, loss_type), expected, expected)


# What raises on samples alone


def attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.h(m.e(x, src_mask=mask).mean(1))


def with_state(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.h(m.r(x, h)[0][:, -1])


def packed(m: Any, x: Tensor, lengths: list[int]) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return m.h(m.r(rows)[1][0])


def of_supports(m: Any, x: Tensor, supports: Tensor) -> Tensor:
    return m.h(x) @ m.s(supports).mean(1)[[0, 1, 2]].T


def alone_models() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    gru = nn.GRU(8, 4, 2, batch_first=True)
    return {
        "a mask (T, T)": (
            Forward(attention, e=encoder, h=nn.Linear(8, 3)),
            (torch.randn(5, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)),
        ),
        "a hidden state": (
            Forward(with_state, r=gru, h=nn.Linear(4, 3)),
            (torch.randn(5, 6, 8), torch.randn(2, 5, 4)),
        ),
        "lengths in a list": (
            Forward(packed, r=nn.GRU(8, 4, batch_first=True), h=nn.Linear(4, 3)),
            (torch.randn(5, 6, 8), [6, 5, 3, 2, 6]),
        ),
        "a support set": (
            Forward(of_supports, h=nn.Linear(8, 4), s=nn.Linear(6, 4)),
            (torch.randn(5, 8), torch.randn(5, 7, 6)),
        ),
    }


@pytest.mark.parametrize("name", alone_models())
def test_trap_29_what_raises_on_one_sample_alone_names_the_remedy(name: str) -> None:
    """The remedy that the message names is tried, and the monitor needs none."""
    model, inputs = alone_models()[name]
    targets = torch.randn(5, 3)
    with pytest.raises(VerificationError, match="verify=False"):
        fisher_report(model, numbers, (inputs, targets), progress=False)
    with pytest.raises(VerificationError, match="verify=False"):
        empirical_fisher_trace(model, numbers, inputs, targets)
    if name == "a support set":
        return  # all samples read it, so that there is no gradient of a sample's own to compare with
    losses = (model(*inputs) - targets).square().sum(1)
    expected = sum(
        float(g.double().square().sum()) / 5
        for loss in losses
        for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    )
    found = fisher_report(model, numbers, (inputs, targets), progress=False, verify=False)["fisher_trace"].sum()
    with FisherMonitor(model) as monitor:
        numbers(model(*inputs), targets).backward()
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(monitor.trace) == pytest.approx(expected, rel=1e-4)


def test_trap_20_a_loss_that_was_computed_inside_of_the_model() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(m.net(x), y), "logits": m.net(x)}

    model, x, y = Forward(forward, net=nn.Linear(4, 3)), torch.randn(5, 4), torch.randint(3, (5,))

    def loss_of(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
        return outputs["loss"]

    expected = float(assert_exact(copy.deepcopy(model.net).double(), x.double(), y, F.cross_entropy).trace)
    for verify in (True, False):
        found = fisher_report(model, loss_of, ((x, y), y), progress=False, verify=verify)["fisher_trace"].sum()
        assert found == pytest.approx(expected, rel=1e-4)
    assert float(empirical_fisher_trace(model, loss_of, (x, y), y)) == pytest.approx(expected, rel=1e-4)


def test_trap_29_the_users_own_exception_on_the_users_own_batch_stays_theirs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        fisher_report(
            Forward(forward, h=nn.Linear(4, 3)), numbers, (torch.ones(5, 4), torch.ones(5, 3)), progress=False
        )


# Whatever else the library's own work raises


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.fixture
def scale_without_a_right_rule() -> Iterator[None]:
    before = dict(registry._rules)

    @register_rule(Scale)
    def scale(module: Scale, call: Any) -> Any:
        raise KeyError("theirs")

    yield
    registry._rules.clear()
    registry._rules.update(before)


@pytest.mark.usefixtures("scale_without_a_right_rule")
def test_trap_29_what_a_rule_of_the_users_raises_stays_theirs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Scale())
    with pytest.raises(KeyError, match="theirs"), FisherMonitor(model):
        model(torch.randn(5, 4)).sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_trap_29_a_kind_of_tensor_that_is_not_known_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    rows = [torch.randn(k, 4) for k in (2, 3, 1)]
    with FisherMonitor(model), pytest.raises(UnsupportedError, match="nested") as caught:
        sum(row.sum() for row in model(torch.nested.nested_tensor(rows)).unbind()).backward()
    assert "jagged" in str(caught.value)


def test_trap_29_what_the_library_itself_raises_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise IndexError("out of range")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    ours = {"__name__": "torch_secorder.per_sample", "IndexError": IndexError}
    monkeypatch.setattr(Outer, "squared_norm", types.FunctionType(broken.__code__, ours))
    with (
        FisherMonitor(model) as monitor,
        pytest.raises(UnsupportedError, match=r"Linear '1'.*IndexError \(out of range\)"),
    ):
        numbers(model(torch.randn(5, 4)), torch.randn(5, 3)).backward()
    assert monitor.n_samples == 0
    assert all(p.grad is not None for p in model.parameters())
