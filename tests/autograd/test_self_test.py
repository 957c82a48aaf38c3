"""The self-test, and a torch that lacks what it looks for: other ways to the same numbers, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.autograd import nodes, saved, self_test
from torch_secorder.errors import SlowFallbackWarning, UnsupportedError

Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Nothing is remembered from other tests, nor for them."""
    saved._known.cache_clear()
    self_test.hooks_are_seen.cache_clear()
    yield
    saved._known.cache_clear()
    self_test.hooks_are_seen.cache_clear()


# What a CPU can't make, so that the class alone is looked at.
ON_GPUS_ONLY = {"CudnnBatchNormBackward0", "CudnnRnnBackward0", "FusedRmsNormBackward0"}
# What the first versions that are supported lack: a fused norm, and grouped products on anything but GPUs.
LATER = {
    "GroupedMmBackward0": hasattr(F, "grouped_mm"),
    "FusedRmsNormBackward0": hasattr(torch._C._functions, "FusedRmsNormBackward0"),
}
KINDS = {kind: table for kind, table in saved.ATTRIBUTES.items() if LATER.get(kind, True)}


@pytest.mark.parametrize("kind", KINDS)
def test_this_torch_has_all_of_it(kind: str) -> None:
    assert kind in self_test.EXAMPLES or kind in ON_GPUS_ONLY
    missing = set(saved.ATTRIBUTES[kind]) - saved._known(kind)
    assert not missing


# Whether torch shows hooks on saved tensors, which the first versions that are supported do not.
SHOWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def test_this_torch_shows_hooks_on_saved_tensors() -> None:
    assert self_test.hooks_are_seen() == SHOWN
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        packed = torch.randn(2, requires_grad=True).square()
    assert nodes.has_packed_tensors(packed.grad_fn) == (True if SHOWN else None)
    plain = torch.randn(2, requires_grad=True).square()
    assert nodes.has_packed_tensors(plain.grad_fn) == (False if SHOWN else None)


def test_each_kind_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    example = self_test.EXAMPLES["MmBackward0"]
    monkeypatch.setitem(self_test.EXAMPLES, "MmBackward0", lambda: made.append("mm") or example())
    for _ in range(3):
        assert saved.knows("MmBackward0", "left", "right")
    assert made == ["mm"]


@pytest.mark.parametrize("kind", ["NoSuchBackward0", "MmBackward0"])
def test_what_is_not_in_the_table_is_not_known(kind: str) -> None:
    assert not saved.knows(kind, "no such thing")


def test_an_attribute_with_another_meaning_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = {"left": "_saved_mat2", "right": "_saved_self"}
    monkeypatch.setitem(saved.ATTRIBUTES, "MmBackward0", swapped)
    assert not saved._known("MmBackward0")


def test_an_attribute_that_this_torch_lacks_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    table = saved.ATTRIBUTES["NativeGroupNormBackward0"]
    monkeypatch.setitem(saved.ATTRIBUTES, "NativeGroupNormBackward0", table | {"mean": "_saved_gone"})
    assert saved._known("NativeGroupNormBackward0") == set(table) - {"mean"}


def test_a_node_that_cannot_be_made_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("no such operation in this build")

    monkeypatch.setitem(self_test.EXAMPLES, "MmBackward0", fails)
    assert not saved._known("MmBackward0")


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_surrounds_the_first_use_has_no_part_in_it(name: str) -> None:
    state = torch.get_rng_state()
    with SURROUNDINGS[name]():
        for kind, table in KINDS.items():
            assert saved.knows(kind, *table), kind
        assert self_test.hooks_are_seen() == SHOWN
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_the_first_use_may_be_inside_of_a_transform(transform: Callable[[Function], Function]) -> None:
    def function(x: Tensor) -> Tensor:
        for kind, table in KINDS.items():
            assert saved.knows(kind, *table), kind
        assert self_test.hooks_are_seen() == SHOWN
        return x.square().sum()

    transform(function)(torch.ones(3))


def test_hooks_that_are_there_do_not_see_it() -> None:
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        assert saved.knows("MulBackward0", "left")
        assert self_test.hooks_are_seen() == SHOWN
    assert not seen


class Functional(nn.Module):
    """Parameters that are used by a function, behind a layer with a rule."""

    def __init__(self, function: Function, *shapes: tuple[int, ...]):
        super().__init__()
        self.function, self.first = function, nn.Linear(6, 6)
        self.values = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), *self.values).flatten(1)


def running(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, torch.linspace(-2, 3, 4).to(x), torch.linspace(0.5, 2, 4).to(x), w, b)


def lstm(x: Tensor, *weights: Tensor) -> Tensor:
    state = x.new_zeros(1, len(x), 3)
    return torch.lstm(x, (state, state), weights, True, 1, 0.0, True, False, True)[0]


def picked(x: Tensor) -> Tensor:
    """Another order of the samples; of one alone the same."""
    order = torch.tensor([4, 0, 3, 1, 2])
    return order[order < len(x)]


def experts(x: Tensor, w: Tensor) -> Tensor:
    """Two matrices, of which each gets the positions that a router sends to it; sizes are multiples of 16 bytes."""
    rows = F.pad(x.reshape(-1, 6).float(), (0, 2))
    chosen = (rows[:, 0] > 0).long()
    order = chosen.argsort(stable=True)
    found = F.grouped_mm(rows[order], w.float(), offs=torch.bincount(chosen, minlength=2).cumsum(0).int())
    return found[order.argsort()].reshape(len(x), -1).tanh().to(x.dtype)


LSTM = [(12, 6), (12, 3), (12,), (12,)]
# What uses a node of each kind, with the shapes of the parameters, for inputs [5, 4, 6].
USES: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "AddmmBackward0": (lambda x, w, b: F.linear(x.flatten(1), w, b), [(3, 24), (3,)]),
    "MmBackward0": (lambda x, w: x.flatten(1) @ w, [(24, 3)]),
    "BmmBackward0": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), [(4, 6, 3)]),
    "MvBackward0": (lambda x, w: (x @ w).tanh(), [(6,)]),
    "GroupedMmBackward0": (experts, [(2, 8, 4)]),
    "ConvolutionBackward0": (F.conv1d, [(3, 4, 2), (3,)]),
    "EmbeddingBackward0": (lambda x, w: x[..., :3] * F.embedding((x[..., 0] > 0).long(), w), [(2, 3)]),
    "NativeLayerNormBackward0": (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(6,), (6,)]),
    "NativeGroupNormBackward0": (lambda x, w, b: F.group_norm(x, 2, w, b), [(4,), (4,)]),
    "NativeBatchNormBackward0": (running, [(4,), (4,)]),
    "PreluKernelBackward0": (F.prelu, [(4,)]),
    "TrilinearBackward0": (lambda x, w: F.bilinear(x[..., :3], x[..., 3:], w), [(2, 3, 3)]),
    "RepeatBackward0": (lambda x, w: x * w.repeat(len(x), 1, 1), [(4, 6)]),
    "MulBackward0": (lambda x, w: x * w, [(4, 6)]),
    "AddBackward0": (lambda x, w: torch.add(x, w, alpha=3).tanh(), [(4, 6)]),
    "SubBackward0": (lambda x, w: torch.sub(x, w, alpha=3).tanh(), [(4, 6)]),
    "MkldnnRnnLayerBackward0": (lstm, LSTM),
    "IndexBackward0": (lambda x, w: (x[picked(x)] * w)[picked(x).argsort()], [(4, 6)]),
    "IndexSelectBackward0": (lambda x, w: (x.index_select(0, picked(x)) * w)[picked(x).argsort()], [(4, 6)]),
    "FlipBackward0": (lambda x, w: (x.flip(0) * w).flip(0), [(4, 6)]),
    "TransposeBackward0": (lambda x, w: x.flatten(1) @ w.transpose(0, 1) + x.flatten(1)[:, :4] @ w[:, :4], [(4, 24)]),
    "PermuteBackward0": (lambda x, w: x * w.permute(1, 0) * w.permute(0, 1).reshape(4, 6), [(6, 4)]),
    "UnsqueezeBackward0": (lambda x, w: x * w.unsqueeze(0) + x[:, :, :1] * w.unsqueeze(1)[:, 0], [(6,)]),
    "UnbindBackward0": (lambda x, w: x * w.unbind(0)[0] + x.tanh() * w.unbind(1)[0][:, None], [(4, 6)]),
    "SelectBackward0": (lambda x, w: x * w[0] + x.tanh() * w[1], [(2, 6)]),
    "SliceBackward0": (lambda x, w: x[..., :3] * w[:3] + x[..., 3:].tanh() * w[3:], [(6,)]),
    "SplitBackward0": (lambda x, w: x[..., :3] * w.split(3)[0] + x[..., 3:].tanh() * w.split(3)[1], [(6,)]),
    "SplitWithSizesBackward0": (
        lambda x, w: x[..., :2] * w.split([2, 4])[0] + x[..., 2:4].tanh() * w.split([4, 2])[1],
        [(6,)],
    ),
    "UnsafeSplitBackward0": (lambda x, w: x[..., :3] * torch.unsafe_split(w, 3)[0], [(6,)]),
}


def setting(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model with such a node, an input and targets."""
    function, shapes = USES[kind]
    torch.manual_seed(0)
    # oneDNN's LSTM and grouped products are of single precision.
    dtype = torch.float32 if kind.startswith(("Mkldnn", "GroupedMm")) else torch.float64
    model, x = nn.Sequential(Functional(function, *shapes)).to(dtype), torch.randn(5, 4, 6, dtype=dtype)
    output = model(x)
    if kind not in set(names(output)):
        assert kind.startswith("Mkldnn")
        pytest.skip("no oneDNN in this build")
    return model, x, torch.randn_like(output)


def names(output: Tensor) -> Iterator[str]:
    """The kinds of nodes in the graph of an output."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            stack += [child for child, _ in node.next_functions]


@pytest.mark.parametrize("gone", [False, True], ids=["all there", "all gone"])
@pytest.mark.parametrize("kind", [kind for kind in USES if kind in KINDS])
def test_what_is_missing_is_done_another_way(kind: str, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting(kind)
    if gone:
        nothing = dict.fromkeys(saved.ATTRIBUTES[kind], "_saved_gone")
        monkeypatch.setitem(saved.ATTRIBUTES, kind, nothing)
        assert not saved._known(kind)
    loss_fn = nn.MSELoss(reduction="sum")
    expected = trace(per_sample_squared_norms(model, loss_fn, x, y), "sum")
    with FisherMonitor(model, reduction="sum") as monitor:
        for _ in range(2):  # of which the second may rely on the first
            loss_fn(model(x), y).backward()
    report = monitor.report()
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), 2 * value, total(expected), x.dtype)
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), total(expected), total(expected), x.dtype)
    if kind in RULED:
        assert report["rule"].str.contains("one sample at a time").any() == gone


RULED = [kind for kind in USES if not kind.startswith(("Index", "Flip"))][:17]


def test_the_kinds_with_a_rule_are_those_of_the_rules() -> None:
    from torch_secorder.rules import node_rules
    from torch_secorder.rules.nodes.broadcast import BY_ENTRIES

    unread = {kind for kind, rule in node_rules._rules.items() if not rule.reads}
    assert unread == {"ExpandBackward0", *BY_ENTRIES}
    picking = {"IndexBackward0", "IndexSelectBackward0"}  # whose uses here pick among the samples
    assert set(RULED) == set(node_rules._rules) - unread - picking - ON_GPUS_ONLY
    for kind, rule in node_rules._rules.items():
        assert set(rule.reads) <= set(saved.ATTRIBUTES.get(kind, {}))


def test_calls_for_one_sample_after_the_other_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict.fromkeys(saved.ATTRIBUTES["NativeGroupNormBackward0"], "_saved_gone")
    monkeypatch.setitem(saved.ATTRIBUTES, "NativeGroupNormBackward0", table)
    model = Functional(lambda x, w, b: F.group_norm(x, 64, w, b), (1024,), (1024,))
    model.first = nn.Identity()
    with pytest.warns(SlowFallbackWarning, match="one sample at a time"), FisherMonitor(model):
        model(torch.randn(64, 1024, 6)).sum().backward()


class Checkpointed(nn.Module):
    """A layer with a rule inside of a checkpoint, and a use of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.first, x, use_reentrant=False) * self.gain


def test_a_torch_that_does_not_show_hooks_refuses_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they keep may be fetched once only, by autograd."""
    model, x = Checkpointed(), torch.randn(5, 6)
    monkeypatch.setattr(nodes, "hooks_are_seen", lambda: False)
    message = "gain: used by MulBackward0 inside of activation checkpointing"
    with pytest.raises(UnsupportedError, match=message), FisherMonitor(model):
        model(x).sum().backward()


def test_a_torch_that_does_not_show_hooks_reads_no_index_inside_of_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint would run its part of the model again for it, at a time when no call belongs to a run."""
    order = torch.tensor([3, 0, 4, 1, 2])

    def forward(m: Any, x: Tensor) -> Tensor:
        moves = order if len(x) == 5 else torch.arange(len(x))
        h = checkpoint(lambda h: m.second(h[moves].tanh()), m.first(x), use_reentrant=False)
        return h[moves.argsort()]

    model = Forward(forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6)).double()
    x, y = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    expected = total(trace(per_sample_squared_norms(model, nn.MSELoss(), x, y)))
    monkeypatch.setattr(nodes, "hooks_are_seen", lambda: False)
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_equal(monitor.trace, expected, expected)


@pytest.mark.parametrize("kind", ["AddmmBackward0", "NativeLayerNormBackward0"])
def test_a_torch_that_does_not_show_hooks_is_exact_without_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting(kind)
    model.append(nn.Sequential(nn.LayerNorm(len(y[0])), nn.Linear(len(y[0]), len(y[0]))).double())
    monkeypatch.setattr(nodes, "hooks_are_seen", lambda: False)
    expected = total(trace(per_sample_squared_norms(model, nn.MSELoss(), x, y)))
    assert_equal(empirical_fisher_trace(model, nn.MSELoss(), x, y), expected, expected)
    exact = total(trace(exact_fisher(model, x, loss_type="mse")))
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), exact, exact)


@pytest.mark.parametrize("attribute", ["unpack_hook", "_raw_saved_"])
def test_missing_signs_of_hooks_are_noticed(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = self_test.raw_tensors
    there = {"unpack_hook": lambda node: [object() for _ in raw(node)], "_raw_saved_": lambda node: []}[attribute]
    monkeypatch.setattr(self_test, "raw_tensors", there)
    assert not self_test.hooks_are_seen()


def test_a_torch_without_shapes_in_its_graph_is_refused_by_name() -> None:
    message = r"torch .* does not show the shapes in its autograd graph"
    with pytest.raises(UnsupportedError, match=message):
        nodes.output_shapes([object()])  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match=message):
        nodes.output_count(object())  # type: ignore[arg-type]


def test_unknown_settings_make_no_two_nodes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Any = torch.randn(2, 3, requires_grad=True).transpose(0, 1).grad_fn
    assert saved.settings(node) is not None
    assert saved.axes(node) == saved.axes(node)
    monkeypatch.setitem(saved.ATTRIBUTES, "TransposeBackward0", {"axis": "_saved_gone"})
    saved._known.cache_clear()
    assert saved.settings(node) is None
    assert saved.axes(node) != saved.axes(node)
