"""The algebra: every form answers as its dense tensor does, whatever algorithm and chunk size it picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, call, mapped, per_sample_gradients
from problems import Problem, every_problem
from torch_secorder.autograd.product_bits import TF32
from torch_secorder.batch_axis.placement import Grouping, Layout
from torch_secorder.capture.records import Call
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample import (
    Convolution,
    Dense,
    Outer,
    PerSampleGradient,
    PulledBack,
    Routed,
    RowSparse,
    SharedFactor,
    _base,
    arithmetic,
    dense_answers,
    gram,
    memory_limit,
    sign_vectors,
)
from torch_secorder.per_sample import outer as outer_module
from torch_secorder.per_sample.arithmetic import MOST_ROWS, WIDE, squares_of_columns
from torch_secorder.rules import rule_for

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

N = 4


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def outer(t: int = 3, k: int = 1, i: int = 4, o: int = 6) -> Outer:
    return Outer(normal(N, k, t, i), normal(N, k, t, o), (k * o, i))


def rows(t: int = 5) -> RowSparse:
    return RowSparse(torch.randint(6, (N, t)), normal(N, t, 4), (6, 4))


def routed(positions: int = 23) -> Routed:
    """Of four matrices, of which two have no position, nor has the third sample."""
    matrix, sample = torch.randint(2, (positions,)) * 2, torch.tensor([0, 1, 3])[torch.randint(3, (positions,))]
    return Routed(normal(positions, 2), normal(positions, 4), matrix, sample, N, (4, 4, 2))


def convolution(size: int = 6, channels: int = 4, groups: int = 1, stride: int = 1, maps: int = 1) -> Convolution:
    x = normal(N, maps, channels, size, size)
    out = (size + 2 - 3) // stride + 1
    g = normal(N, maps, 6, out, out)
    return Convolution(x, g, (6, channels // groups, 3, 3), (stride,) * 2, (1, 1), (1, 1), groups)


FORMS: dict[str, Callable[[], PerSampleGradient]] = {
    "dense": lambda: Dense(normal(N, 6, 4)),
    "outer product": lambda: outer(t=1),
    "outer gram": lambda: outer(t=2),
    "outer direct": lambda: outer(t=9),
    "outer groups": lambda: outer(t=3, k=2, o=3),
    "rows": rows,
    "convolution shifted": convolution,
    "convolution gram": lambda: convolution(size=2, channels=512),
    "convolution groups": lambda: convolution(groups=2, stride=2),
    "convolution of several maps": lambda: convolution(maps=3, groups=2),
    "convolution gram of several maps": lambda: convolution(size=1, channels=256, maps=3),
    "convolution depthwise": lambda: Convolution(
        normal(N, 1, 6, 6, 6), normal(N, 1, 6, 3, 3), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), 6
    ),
    "convolution twice": lambda: convolution() + convolution(maps=2),
    "convolution of two sizes": lambda: convolution() + convolution(size=4),
    "carried by a transpose": lambda: PulledBack(outer(o=4, i=6), lambda value: value.mT, (6, 4), "transpose"),
    "carried by a function": lambda: PulledBack(outer(), lambda value: value * torch.arange(4.0), (6, 4)),
    "sum with rows": lambda: rows() + outer(),
    "sum without rows": lambda: Dense(normal(N, 6, 4)) + outer(),
    "sum of three": lambda: Dense(normal(N, 6, 4)) + outer() + rows(),
    "routed": routed,
    "routed twice": lambda: routed() + routed(),
    "routed and dense": lambda: routed() + Dense(normal(N, 4, 4, 2)),
    "same kind twice": lambda: outer() + outer(t=2),
}


def assert_like_dense(form: PerSampleGradient) -> None:
    dense = form.dense()
    total = dense.square().sum()
    assert dense.shape == (form.n, *form.shape)
    assert_equal(form.squared_norm(), dense.flatten(1).square().sum(1), total)
    assert_equal(form.sum_of_squares(), dense.square().sum(0), total)
    with torch.no_grad():  # With a graph nothing comes together.
        both = form.squares_and_norms()
    if both is not None:
        assert_equal(both[0], dense.square().sum(0), total)
        assert_equal(both[1], dense.flatten(1).square().sum(1), total)
    torch.testing.assert_close(form.total(), dense.sum(0), rtol=1e-9, atol=1e-9 * float(total.sqrt()))


@pytest.fixture(params=[None, 1], ids=["large chunks", "chunks of one sample"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        whole = dense_answers.chunks
        one = lambda n, size, usual: whole(n, size, request.param)  # noqa: E731
        monkeypatch.setattr(dense_answers, "chunks", one)
        monkeypatch.setattr("torch_secorder.per_sample.outer.chunks", one)
        monkeypatch.setattr("torch_secorder.per_sample.outer_channels.chunks", one)
        monkeypatch.setattr("torch_secorder.per_sample.routed.chunks", one)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("name", FORMS)
def test_every_answer_is_that_of_the_dense_form(name: str) -> None:
    assert_like_dense(FORMS[name]())


POINTWISE: dict[str, Callable[[], PerSampleGradient]] = {
    "convolution pointwise": lambda: Convolution(
        normal(N, 2, 4, 5, 5), normal(N, 2, 6, 5, 5), (6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1
    ),
    "convolution pointwise with a stride": lambda: Convolution(
        normal(N, 1, 4, 5, 5), normal(N, 1, 6, 3, 3), (6, 4, 1, 1), (2, 2), (0, 0), (1, 1), 1
    ),
    "convolution pointwise with padding": lambda: Convolution(
        normal(N, 1, 4, 5, 5), normal(N, 1, 6, 7, 7), (6, 4, 1, 1), (1, 1), (1, 1), (1, 1), 1
    ),
}


@pytest.mark.parametrize("name", FORMS | POINTWISE)
def test_the_total_along_a_direction_is_that_of_the_dense_form(name: str) -> None:
    form = (FORMS | POINTWISE)[name]()
    left, right = sign_vectors(form.shape, form.like)
    total = form.dense().sum(0)
    total = total.reshape(len(left), len(right))
    torch.testing.assert_close(form.along(left, right), left @ total @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", FORMS)
def test_sums_over_channels_are_those_of_the_dense_form(name: str, groups: int) -> None:
    form = FORMS[name]()
    squares = form.dense().square()
    parts = squares.chunk(groups, 1)
    inputs = torch.cat([part.movedim(2, 1).flatten(2).sum(2) for part in parts], 1)
    for axis, of_samples in enumerate((squares.flatten(2).sum(2), inputs)):
        channels = ChannelSums(axis, groups)
        assert_equal(form.channel_squares(channels), of_samples.sum(0), squares.sum())
        assert_equal(form.sample_channel_squares(channels), of_samples, squares.sum())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("samples", [slice(1, 3), slice(0, 1), torch.tensor([2, 0])], ids=str)
def test_selected_samples(name: str, samples: Any) -> None:
    form = FORMS[name]()
    selected = form.select(samples)
    assert torch.allclose(selected.dense(), form.dense()[samples], rtol=1e-12)
    assert_like_dense(selected)


@pytest.mark.parametrize("name", FORMS)
def test_samples_that_are_lost_are_zeros(name: str) -> None:
    form, lost = FORMS[name](), torch.tensor([False, True, False, True])
    expected = form.dense()
    expected[lost] = 0
    left = form.without(lost)
    torch.testing.assert_close(left.dense(), expected, rtol=1e-12, atol=1e-12)
    assert_like_dense(left)


@pytest.mark.parametrize("width", [8, 200])
@pytest.mark.parametrize("nonsense", [float("nan"), float("inf")])
def test_squares_that_come_with_the_norms_leave_out_what_is_not_finite(nonsense: float, width: int) -> None:
    """Rows of 40,000 entries are added up one after the other."""
    a, g = normal(N, 1, 3, width), normal(N, 1, 3, width)
    a[1, 0, 0, 0] = nonsense
    with torch.no_grad():
        found = Outer(a, g, (width, width)).squares_and_norms()
    assert found is not None
    squares, norms = found
    expected = torch.einsum("nti,nto->noi", a[:, 0], g[:, 0]).square()
    left = [n for n in range(N) if n != 1]
    torch.testing.assert_close(squares, expected[left].sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norms[left], expected[left].sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert not norms[1].isfinite()


@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("columns", [3, WIDE])
def test_squares_of_columns(rows: int, columns: int) -> None:
    value = normal(rows, columns)
    before = value.clone()
    torch.testing.assert_close(squares_of_columns(value), (value**2).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(value, before)


def test_long_sums_of_squares_keep_their_digits() -> None:
    """Each of the positive numbers is off by 2^-24 at most, and so few are added up that the sum is off by 4e-6 of itself."""
    value = torch.rand(MOST_ROWS, WIDE) + 1
    expected = (value.double() ** 2).sum(0)
    torch.testing.assert_close(squares_of_columns(value).double(), expected, rtol=MOST_ROWS * 2.0**-24, atol=0)


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf")])
def test_of_samples_that_are_lost_nothing_is_left(nonsense: float) -> None:
    form = outer()
    form.a[1], form.g[1] = nonsense, nonsense
    assert form.without(torch.tensor([False, True, False, False])).sum_of_squares().isfinite().all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("owner", "n", "layout"),
    [
        ([0, 0, 1, 1], 2, Layout.INDEXED),
        ([1, 0, 1, 0], 2, Layout.INDEXED),
        ([2, 0, 2, 2], 3, Layout.INDEXED),
        ([0, 0, 0, 0], 1, Layout.INDEXED),
        ([0, 0, 1, 1], 2, Layout.BLOCKS),
        ([0, 1, 0, 1], 2, Layout.INTERLEAVED),
    ],
    ids=str,
)
def test_parts_of_samples_are_added_up(name: str, owner: list[int], n: int, layout: Layout) -> None:
    """Windows or heads folded into the batch axis, in any order, as many for each sample or not."""
    form, index = FORMS[name](), torch.tensor(owner)
    grouped_by_sample = form.grouped_by_sample(Grouping(n, layout, index if layout is Layout.INDEXED else None))
    expected = torch.zeros(n, *form.shape, dtype=torch.float64).index_add(0, index, form.dense())
    assert torch.allclose(grouped_by_sample.dense(), expected, rtol=1e-9, atol=1e-12)
    assert_like_dense(grouped_by_sample)


SAME_SHAPE = [
    "carried by a transpose",
    "carried by a function",
    "dense",
    "outer product",
    "outer gram",
    "outer direct",
    "rows",
    "sum with rows",
    "sum without rows",
]


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("first", SAME_SHAPE)
@pytest.mark.parametrize("second", SAME_SHAPE)
def test_sums_and_inner_products_of_every_two_kinds(first: str, second: str) -> None:
    a, b = FORMS[first](), FORMS[second]()
    dense = (a.dense() * b.dense()).flatten(1).sum(1)
    scale = float((a.squared_norm() * b.squared_norm()).sqrt().max())
    torch.testing.assert_close(a.inner(b), dense, rtol=1e-9, atol=1e-9 * scale)
    both = a + b
    assert torch.allclose(both.dense(), a.dense() + b.dense(), rtol=1e-9, atol=1e-12)
    assert_like_dense(both)


@pytest.mark.parametrize(
    ("form", "algorithm"),
    [
        (lambda: outer(t=1), "product"),
        (lambda: outer(t=2), "gram"),
        (lambda: outer(t=40), "direct"),
        (lambda: convolution(size=2, channels=512), "gram"),
        (convolution, "shifted"),
        (FORMS["convolution depthwise"], "direct"),
    ],
)
def test_the_algorithm_is_chosen_by_cost(form: Callable[[], PerSampleGradient], algorithm: str) -> None:
    assert form().algorithm == algorithm


def test_forms_of_different_parameters_cannot_be_added() -> None:
    with pytest.raises(ValueError, match=r"6, 4.*4, 6|4, 6.*6, 4"):
        _ = Dense(normal(N, 6, 4)) + Dense(normal(N, 4, 6))
    with pytest.raises(ValueError, match=r"4.*5"):
        _ = Dense(normal(N, 6, 4)) + Dense(normal(5, 6, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3, 0.3])
def test_gram_sums_that_cancel_keep_their_digits(left_over: float, dtype: torch.dtype) -> None:
    a, g = normal(N, 1, 1, 24, dtype=dtype), normal(N, 1, 1, 20, dtype=dtype)
    form = Outer(torch.cat([a, a * (1 + left_over)], 2), torch.cat([g, -g], 2), (20, 24))
    assert form.algorithm == "gram"
    exact = Outer(form.a.double(), form.g.double(), (20, 24)).dense().flatten(1).square().sum(1)
    assert (form.squared_norm() >= 0).all()
    if left_over >= 1e-3 or dtype == torch.float64:
        rtol = 1e-4 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(form.squared_norm().double(), exact, rtol=rtol, atol=0)
    else:
        # What is left of the difference of float32 numbers is rounding; it must stay as small as rounding.
        magnitude = 2 * a.double().square().sum((1, 2, 3)) * g.double().square().sum((1, 2, 3))
        assert (form.squared_norm().double() <= 1e-11 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("axis", [0, 1])
def test_channels_that_cancel_keep_their_digits(axis: int, left_over: float, dtype: torch.dtype) -> None:
    """Half of the channels' gradients are differences of two positions."""
    a, g = normal(N, 1, 1, 24, dtype=dtype), normal(N, 1, 1, 20, dtype=dtype)
    both = {0: a, 1: g}
    other, own = both[axis], both[1 - axis]
    signs = torch.where(torch.arange(own.shape[3]) % 2 == 0, -1.0, 1.0).to(dtype)
    factors = {axis: torch.cat([other, other * (1 + left_over)], 2), 1 - axis: torch.cat([own, own * signs], 2)}
    form = Outer(factors[0], factors[1], (20, 24))
    assert form.algorithm == "gram"
    squares = Outer(form.a.double(), form.g.double(), (20, 24)).dense().square()
    exact = squares.sum(0).sum(1 - axis)
    found = form.channel_squares(ChannelSums(axis))
    assert (found >= 0).all()
    norms = form.sample_channel_squares(ChannelSums(axis)).sum(1)
    torch.testing.assert_close(
        norms.double(), squares.sum((1, 2)), rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=0
    )
    if left_over >= 1e-3 or dtype == torch.float64:
        rtol = 1e-4 if dtype == torch.float32 else 1e-8
        # Two products that are equal may be rounded differently, by 1e-16 of each: that is 1e-32 in a square.
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=1e-28 * float(exact.max()))
    else:
        assert ((found.double() - exact).abs() <= 1e-4 * exact + 1e-11 * exact.max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_that_cancel_keep_their_digits_beside_sums_over_channels(axis: int, dtype: torch.dtype) -> None:
    """One sample's gradient is the difference of two positions, which the sums over all samples don't show."""
    a, g = normal(N, 1, 1, 24, dtype=dtype), normal(N, 1, 1, 20, dtype=dtype)
    signs = torch.ones(N, 1, 1, 1, dtype=dtype)
    signs[1] = -1
    form = Outer(torch.cat([a, a * (1 + 1e-3)], 2), torch.cat([g, g * signs], 2), (20, 24))
    exact = Outer(form.a.double(), form.g.double(), (20, 24)).dense().square().sum(2 - axis)
    found = form.sample_channel_squares(ChannelSums(axis))
    assert form.shares_norms_with(ChannelSums(axis))
    rtol = 1e-4 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(found.sum(1).double(), exact.sum(1), rtol=rtol, atol=0)
    torch.testing.assert_close(found.sum(0).double(), exact.sum(0), rtol=rtol, atol=0)


@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3])
def test_tied_terms_that_cancel_keep_their_digits(left_over: float) -> None:
    """An embedding and the head tied to it, whose gradients point in opposite directions."""
    ids, g = torch.tensor([[0, 2, 2], [1, 1, 1]]), normal(2, 3, 4)
    one_hot = torch.nn.functional.one_hot(ids, 6).double()[:, None]
    form = RowSparse(ids, g, (6, 4)) + Outer(-g[:, None] * (1 - left_over), one_hot, (6, 4))
    exact = form.dense().flatten(1).square().sum(1)
    assert (form.squared_norm() >= 0).all()
    torch.testing.assert_close(form.squared_norm(), exact, rtol=1e-8, atol=1e-24)


@pytest.mark.parametrize("left_over", [1e-6, 1e-4])
def test_tied_terms_whose_own_positions_cancel_keep_their_digits(left_over: float) -> None:
    """The gradients of an embedding and of its head each are sums of positions that cancel, and the two sums do not."""
    ids, signs = torch.zeros(2, 64, dtype=torch.int64), torch.tensor([1, left_over - 1]).double().repeat(32)[:, None]
    of_rows, outputs = (normal(2, 1, size) * signs for size in (4, 6))
    outer = Outer(normal(2, 1, 1, 4).expand(-1, -1, 64, -1), outputs[:, None], (6, 4))
    assert outer.algorithm == "direct"
    form = outer + RowSparse(ids, of_rows, (6, 4))
    exact = form.dense().flatten(1).square().sum(1)
    torch.testing.assert_close(form.squared_norm(), exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("positions", [1, 5, 6, 7, 20])
def test_rows_of_short_and_long_tables_have_the_norms_of_their_gradients(positions: int) -> None:
    form = rows(positions)  # of a table with six rows
    expected = torch.stack(
        [
            torch.stack([g[ids == row].sum(0).square().sum() for row in range(6)]).sum()
            for ids, g in zip(form.ids, form.g, strict=True)
        ]
    )
    assert torch.allclose(form.squared_norm(), expected, rtol=1e-12)
    norms = form.norms()
    assert norms is not None
    assert torch.allclose(norms.square(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "outer", "rows", "convolution"])
def test_half_precision_factors_are_squared_in_float32(name: str, dtype: torch.dtype) -> None:
    large = 300.0  # its square overflows float16
    form = {
        "dense": lambda: Dense(torch.full((N, 3), large, dtype=dtype)),
        "outer": lambda: Outer(*(torch.full((N, 1, 1, 3), large, dtype=dtype),) * 2, (3, 3)),
        "rows": lambda: RowSparse(
            torch.zeros(N, 1, dtype=torch.long), torch.full((N, 1, 3), large, dtype=dtype), (2, 3)
        ),
        "convolution": lambda: Convolution(
            *(torch.full((N, 1, 1, 2, 2), large, dtype=dtype), torch.full((N, 1, 1, 1, 1), large, dtype=dtype)),
            *((1, 1, 2, 2), (1, 1), (0, 0), (1, 1), 1),
        ),
    }[name]()
    assert form.squared_norm().dtype == torch.float32
    expected = {"dense": 3 * large**2, "outer": 9 * large**4, "rows": 3 * large**2, "convolution": 4 * large**4}[name]
    assert form.squared_norm().tolist() == pytest.approx([expected] * N, rel=1e-2)


def captured(problem: Problem) -> tuple[dict[str, PerSampleGradient], dict[str, Tensor], dict[str, Tensor]]:
    """For each parameter: its form, autograd's gradient of the summed loss, and the loop's per-sample gradients."""
    setting = problem.setting()
    loss_fn = nn.MSELoss(reduction="sum")
    expected = per_sample_gradients(setting.model, loss_fn, setting.inputs, setting.targets)
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if output.requires_grad:
            detached = [
                mapped(values, lambda x: x.detach() if isinstance(x, Tensor) else x) for values in (args, kwargs)
            ]
            calls.append((module, *detached, output))
            return output.clone()  # so that what comes next may work in place
        return None

    names = {id(p): name for name, p in setting.model.named_parameters() if p.requires_grad}
    for module in setting.model.modules():
        if any(id(p) in names for p in module.parameters(recurse=False)):
            module.register_forward_hook(seen, with_kwargs=True)
    loss = loss_fn(call(setting.model, setting.inputs), setting.targets)
    outputs = [output for *_, output in calls]
    grads = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    forms: dict[str, PerSampleGradient] = {}
    for (module, args, kwargs, _), grad in zip(calls, grads, strict=True):
        if grad is None:
            continue
        rule = rule_for(module)
        assert not isinstance(rule, str), rule
        own = {local: p for local, p in module.named_parameters(recurse=False) if id(p) in names}
        found = rule(
            module,
            Call(args, kwargs, grad, training=module.training),
            {local: tuple(p.shape) for local, p in own.items()},
        )
        for local, p in own.items():
            name = names[id(p)]
            forms[name] = forms[name] + found[local] if name in forms else found[local]
    for p in setting.model.parameters():
        p.grad = None
    loss.backward()
    batch = {name: p.grad.to_dense() for name, p in setting.model.named_parameters() if p.grad is not None}
    return forms, batch, expected


@every_problem
def test_rules_conserve_the_gradient(problem: Problem) -> None:
    """Dense, summed over samples: autograd's gradient. Sample by sample: the loop's. And every shortcut agrees."""
    forms, batch, expected = captured(problem)
    assert forms.keys() == batch.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, form in forms.items():
        torch.testing.assert_close(form.dense(), expected[name], rtol=1e-8, atol=1e-11 * scale)
        torch.testing.assert_close(form.total(), batch[name], rtol=1e-8, atol=1e-11 * scale)
        torch.testing.assert_close(form.dense().sum(0), batch[name], rtol=1e-8, atol=1e-11 * scale)
        assert_like_dense(form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_over", [1.0, 0.6, 1e-4, 0.0])
@torch.no_grad()
def test_the_norm_of_a_sum_from_its_factors_or_not_at_all(left_over: float, dtype: torch.dtype) -> None:
    a, g = normal(2, 1, 1, 280), normal(2, 1, 1, 290)
    form = Outer(*(x.to(dtype) for x in (torch.cat([a, a]), torch.cat([g, (left_over - 1) * g]))), (290, 280))
    found, expected = form.batch_gradient_norm(), (left_over * g.flatten(1).T @ a.flatten(1)).norm()
    if left_over > 0.5:
        assert found is not None
    if found is not None:
        assert_equal(found, expected, expected)


@torch.no_grad()
def test_the_norm_of_a_sum_is_not_taken_from_factors_where_that_is_dear() -> None:
    assert outer(t=1).batch_gradient_norm() is None  # small
    assert (
        Outer(normal(4, 1, 2, 300), normal(4, 1, 2, 300), (300, 300)).batch_gradient_norm() is None
    )  # of several positions


@pytest.mark.parametrize("t", [3, 40])
@pytest.mark.parametrize("gradient", [False, True])
def test_forms_with_a_common_factor_compute_its_gram_matrix_once(
    t: int, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, made = gram.gram_columns, []

    def counted(x: Tensor, *part: Any) -> Tensor:
        made.append(x)
        return columns(x, *part)

    monkeypatch.setattr(gram, "gram_columns", counted)
    monkeypatch.setattr(outer_module, "gram_columns", counted)
    g, (a, b) = normal(N, 1, t, 70).requires_grad_(gradient), (normal(N, 1, t, 60) for _ in range(2))
    common = SharedFactor(g)
    for left, right, shape in (
        (a, common, (70, 60)),
        (b, common, (70, 60)),
        (common, a, (60, 70)),
        (common, common, (70, 70)),
    ):
        form = Outer(left, right, shape)
        assert form.algorithm == "gram"
        with torch.set_grad_enabled(gradient):
            torch.testing.assert_close(form.squared_norm(), form.dense().flatten(1).square().sum(1))
    assert sum(x is g for x in made) == -(-t // 32)


def test_a_common_gram_matrix_is_not_kept_beyond_the_budget() -> None:
    common, a = SharedFactor(normal(N, 1, 40, 70)), normal(N, 1, 40, 60)
    with memory_limit(2**14):
        found = Outer(a, common, (70, 60)).squared_norm()
    torch.testing.assert_close(found, Outer(a, common.value, (70, 60)).squared_norm())
    assert not common._kept


def test_of_products_of_few_bits_less_may_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 bears, TF32 does not."""
    single, double = torch.zeros(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float64)
    assert arithmetic.cancellation_floor(double) == pytest.approx(8.9e-7, rel=0.01)
    assert arithmetic.cancellation_floor(single) == pytest.approx(0.0477, rel=0.01)
    monkeypatch.setattr(arithmetic, "product_bits", lambda device, convolves: TF32)
    assert arithmetic.cancellation_floor(double) == pytest.approx(8.9e-7, rel=0.01)
    assert arithmetic.cancellation_floor(single) == pytest.approx(0.39, rel=0.01)
    assert _base.has_cancelled(torch.tensor([0.3, 0.5]), torch.ones(2)).tolist() == [True, False]
