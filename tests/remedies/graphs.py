"""More refusals with their remedies: of parts, of graphs that can't be read, and of what was saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from oracles import exact_fisher, total
from problems._base import Forward
from remedies.programs import expected, linear, monitored, problem, refused, right, step
from remedies.registry import remedy
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    fisher_results,
    generalized_fisher_trace,
)
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.rules import register_rule, registry
from traps.exactness import assert_exact, drawn, numbers


@remedy("where this model has its * can't be found out")
def _only_the_loss() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        outputs = m.net(x)
        loss = numbers(outputs, y)
        return (loss, outputs) if m.returns_both else loss

    model, x, y = Forward(forward, net=linear()).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    model.returns_both = False
    with refused("return the outputs along with the loss"):
        monitored(model, lambda: model(x, y).backward())
    model.returns_both = True
    right(monitored(model, lambda: model(x, y)[0].backward()), expected(model.net, x, y))

    _rows_of_tokens()


def _rows_of_tokens() -> None:
    """Rows (N * T, C) with as many classes as samples look like steps in front, for which the remedy would be another one."""
    words = nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)
    model, x, y = nn.Sequential(*words, nn.Flatten(0, 1)).double(), torch.randint(7, (3, 5)), torch.randint(3, (3, 5))

    def of_rows() -> None:
        F.cross_entropy(model(x), y.flatten()).backward()

    with refused("if the outputs have several rows for each sample, return them as (N, T, ...), or pass sample_of="):
        monitored(model, of_rows)
    inner, truth = model[:-1], 0.0
    for n in range(3):
        loss = F.cross_entropy(inner(x[n]), y[n])
        truth += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(inner.parameters()))) / 3
    right(monitored(model, of_rows, sample_of=lambda x: torch.arange(3).repeat_interleave(x.shape[1])), truth)
    right(monitored(inner, lambda: F.cross_entropy(inner(x).flatten(0, 1), y.flatten()).backward()), truth)


@remedy("how many samples this model has can't be found out")
def _trees() -> None:
    """A model of words and pairs, in which no argument is a tensor."""

    def of_tree(m: Any, tree: Any) -> Tensor:
        if isinstance(tree, int):
            return m.words(torch.tensor(tree))
        return m.pair(torch.cat([of_tree(m, part) for part in tree])).tanh()

    def forward(m: Any, trees: list[Any]) -> Tensor:
        return m.head(torch.stack([of_tree(m, tree) for tree in trees]))

    model = Forward(forward, words=nn.Embedding(7, 4), pair=nn.Linear(8, 4), head=nn.Linear(4, 3)).double()
    trees, y = [((1, 2), 3), (4, (5, 6)), (1, 1), (2, 0)], torch.randn(4, 3).double()
    with refused("no tensor among its arguments counts them"):
        monitored(model, lambda: numbers(model(trees), y).backward())
    found = monitored(model, lambda: numbers(model(trees), y).backward(), n_samples=len)
    truth = 0.0
    for n in range(4):
        gradients = torch.autograd.grad(numbers(model(trees[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        truth += sum(float(g.square().sum()) for g in gradients) / 4
    right(found, truth)


@remedy("samples; pass batch_axis={'modules': {'*': axis}} if it has one")
def _wrong_axis() -> None:
    model = Forward(lambda m, x: m.l(x.transpose(0, 1)).transpose(0, 1), l=nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 6, 4).double(), torch.randn(5, 6, 3).double()
    with refused("pass batch_axis={'modules': {'l': axis}}"):
        monitored(model, lambda: step(model, x, y), batch_axis={"modules": {"l": 0}})
    right(monitored(model, lambda: step(model, x, y), batch_axis={"modules": {"l": 1}}), expected(model, x, y))


class LastStep(nn.Module):
    """Recurrent, with steps in front: the samples are on axis 1 of its inputs and on axis 0 of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][-1])


@remedy("says that every tensor, this one too, has its samples on axis")
def _one_axis_for_everything() -> None:
    model, x, y = LastStep().double(), torch.randn(7, 6, 4).double(), torch.randn(6, 3).double()
    with refused("pass batch_axis={'inputs': 1} if only the model's inputs"):
        monitored(model, lambda: step(model, x, y), batch_axis=1)
    squares = []
    for n in range(6):
        gradients = torch.autograd.grad(numbers(model(x[:, n : n + 1]), y[n : n + 1]), list(model.parameters()))
        squares.append(sum(g.square().sum() for g in gradients))
    found = monitored(model, lambda: step(model, x, y), batch_axis={"inputs": 1})
    torch.testing.assert_close(found.trace, torch.stack(squares).mean(), rtol=1e-8, atol=0)

    folds = Forward(lambda m, x: m.of(x.flatten(0, 1)).unflatten(0, x.shape[:2]), of=linear()).double()
    x, y = torch.randn(7, 6, 4).double(), torch.randn(7, 6, 3).double()
    turned = Forward(lambda m, x: m.of(x.transpose(0, 1)).transpose(0, 1), of=folds)

    def of_columns() -> None:
        numbers(turned.of(x).transpose(0, 1), y.transpose(0, 1)).backward()

    with refused("and {'inputs': 1, 'outputs': 1} if its outputs"):
        monitored(folds, of_columns, batch_axis=1)
    found = monitored(folds, of_columns, batch_axis={"inputs": 1, "outputs": 1})
    right(found, expected(turned, x.transpose(0, 1), y.transpose(0, 1)))

    model, x, y = problem()
    for axis in (1, 3):
        with refused("leave batch_axis out if samples come first"):
            monitored(model, lambda: step(model, x, y), batch_axis=axis)
    right(monitored(model, lambda: step(model, x, y)), expected(model, x, y))


@remedy("was called more than once outside of a call of the monitored model")
def _part_twice() -> None:
    model, x, y = problem()
    whole = Forward(lambda m, x: m.net(x), net=model)
    other = torch.randn(5, 4).double()

    def difference() -> None:
        numbers(model(x) - model(other), y).backward()

    with refused("monitor the submodule that is called"):
        monitored(whole, difference, batch_axis=0)
    siamese = Forward(lambda m, pair: m.of(pair[:, 0]) - m.of(pair[:, 1]), of=model)
    truth = expected(siamese, torch.stack([x, other], 1), y)
    right(monitored(whole, difference, batch_axis=0, repeated_calls="same"), truth)
    right(monitored(model, difference, repeated_calls="same"), truth)

    def both() -> None:
        (numbers(model(x), y) + numbers(model(other), y)).backward()

    truth = 4 * (expected(model, x, y) + expected(model, other, y)) / 2  # each loss is twice its share of 2 N samples
    with refused("monitor the submodule that is called"):
        monitored(whole, both, batch_axis=0, repeated_calls="new")
    right(monitored(model, both, repeated_calls="new"), truth)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@remedy("inside of activation checkpointing (or other hooks on saved tensors)")
def _function_in_a_checkpoint() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(checkpoint(m.scale, h, use_reentrant=False) if m.checkpoints else m.scale(h))

    model = Forward(forward, first=nn.Linear(4, 4), scale=Scale(), last=nn.Linear(4, 3))
    model.checkpoints = True
    model, x, y = drawn(model, 5, 4)
    with refused("run it without checkpointing"):
        monitored(model, lambda: step(model, x, y))
    model.checkpoints = False
    truth = expected(model, x, y)
    right(monitored(model, lambda: step(model, x, y)), truth)
    model.checkpoints, before = True, dict(registry._rules)
    try:
        register_rule(Scale)(lambda module, call: {"gain": call.inputs[0] * call.grad_output})
        right(monitored(model, lambda: step(model, x, y)), truth)
    finally:
        registry._rules.clear()
        registry._rules.update(before)


@remedy("no exact rule for the frozen parameters of")
def _frozen_without_a_rule() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), Scale(), nn.Linear(4, 3)), 5, 4)
    truth = expected(model, x, y)
    model[1].requires_grad_(False)
    with refused("teach the library these layers"):
        FisherMonitor(model, parameters="all")
    before = dict(registry._rules)
    try:
        register_rule(Scale)(lambda module, call: {"gain": call.inputs[0] * call.grad_output})
        right(monitored(model, lambda: step(model, x, y), parameters="all"), truth)
    finally:
        registry._rules.clear()
        registry._rules.update(before)
    model[1].requires_grad_(True)
    right(monitored(model, lambda: step(model, x, y)), truth)


class _Negated(torch.autograd.Function):
    in_place = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mul_(-3) if _Negated.in_place else grads[0] * -3


@remedy("the gradient of its output was changed in place after it had arrived")
def _gradient_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        adverse = _Negated.apply(m.second(x).tanh())
        return adverse + m.first(x)

    model, x, y = drawn(Forward(forward, first=nn.Linear(6, 3), second=nn.Linear(6, 3)), 4, 6)
    unchecked = next(number for number in range(1, 20) if not is_due(number))
    _Negated.in_place = True
    with FisherMonitor(model) as monitor:
        for _ in range(unchecked - 1):
            step(model, x, y)
        with refused("return a new one there"):
            step(model, x, y)
    _Negated.in_place = False
    truth = expected(model, x, y)
    with FisherMonitor(model) as monitor:
        for _ in range(unchecked):
            step(model, x, y)
    right(monitor, truth)


@remedy("is not the sum of what the model's samples contribute")
def _penalty_in_a_monitor() -> None:
    model, x, y = problem()

    def penalty() -> Tensor:
        return sum(p.square().sum() for p in model.parameters())

    with refused("differentiate it in a backward pass outside of the block"):
        monitored(model, lambda: (numbers(model(x), y) + penalty()).backward())
    monitor = monitored(model, lambda: step(model, x, y))
    penalty().backward()
    right(monitor, expected(model, x, y))


@remedy("but no call of this")
def _forward_before_the_block() -> None:
    model, x, y = problem()
    outputs = model(x)
    monitor = FisherMonitor(model)
    with refused("no call of this Sequential was seen inside the block: call the model, too, inside"), monitor:
        numbers(outputs, y).backward()
    with monitor:
        step(model, x, y)
    right(monitor, expected(model, x, y))


@remedy("by a way that nothing accounts for")
def _earlier_forward_in_a_later_pass() -> None:
    model, x, y = problem()
    outputs = model(x)
    monitor = FisherMonitor(model)
    with monitor:
        step(model, x, y)
    with refused("a forward that ran before the block was entered (call the model inside)"), monitor:
        numbers(outputs, y).backward()
    penalty = 3 * model[0].weight.square().sum()
    with refused("such as a penalty (differentiate it outside of the block)"), monitor:
        penalty.backward(retain_graph=True)
    penalty.backward()
    right(monitor, expected(model, x, y))
    with monitor:
        step(model, x, y)
    assert monitor.n_samples == 2 * len(x)
    right(monitor, expected(model, x, y))


@remedy("DataParallel runs copies of the model")
def _data_parallel() -> None:
    model, x, y = problem()
    parallel = nn.DataParallel(model)
    with refused("use the bare model"):
        FisherMonitor(parallel)
    assert_exact(parallel.module, x, y)


@remedy("this monitor was loaded without its model: pass it, FisherMonitor.load(path, model)")
def _loaded_alone() -> None:
    model, x, y = problem()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        monitored(model, lambda: step(model, x, y)).save(path)
        with refused("FisherMonitor.load(path, model)"), FisherMonitor.load(path):
            pass
        loaded = FisherMonitor.load(path, model)
    with loaded:
        step(model, x, y)
    right(loaded, expected(model, x, y))
    assert loaded.n_samples == 2 * len(x)


@remedy("this monitor was loaded from results of the exact Fisher")
def _loaded_exact() -> None:
    model, x, _ = problem()
    found = [
        fisher_results(model, None, (part, None), fisher="exact", loss_type="mse", progress=False)
        for part in x.split(3)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        found[0].save(path)
        monitor = FisherMonitor.load(path, model)
        with refused("merge it with other exact results"), monitor:
            pass
    monitor.merge(found[1])
    right(monitor, float(total(exact_fisher(model, x, loss_type="mse")) / len(x)))
    assert monitor.report().attrs["n_samples"] == len(x)


@remedy("no process group: call torch.distributed.init_process_group first")
def _no_process_group() -> None:
    model, x, y = problem()
    monitor = monitored(model, lambda: step(model, x, y))
    with refused("init_process_group first"):
        monitor.all_reduce()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        right(monitor.all_reduce(), expected(model, x, y))
    finally:
        dist.destroy_process_group()


@remedy("the model returned a * without logits; return a tensor of outputs")
def _no_logits() -> None:
    model, x, _ = problem()
    pair = Forward(lambda m, x: {"scores": m.net(x)}, net=model)

    def exact(model: nn.Module) -> float:
        return fisher_report(model, None, (x, None), fisher="exact", loss_type="mse", progress=False)[
            "fisher_trace"
        ].sum()

    with refused("return a tensor of outputs"):
        exact(pair)
    truth = float(total(exact_fisher(model, x, loss_type="mse")) / len(x))
    assert exact(Forward(lambda m, x: m.net(x), net=model)) == pytest.approx(truth, rel=1e-8)


@remedy("pass num_samples=k for an unbiased estimate from k passes")
def _too_many_passes() -> None:
    model, x, _ = problem()
    outputs = model(x)
    with refused("pass num_samples=k"):
        generalized_fisher_trace(model, outputs, None, "mse", max_passes=2)
    truth = float(total(exact_fisher(model, x, loss_type="mse")) / len(x))
    draws = generalized_fisher_trace(
        model, outputs, None, "mse", num_samples=600, max_passes=2, generator=torch.Generator().manual_seed(0)
    )
    assert float(draws) == pytest.approx(
        truth, rel=0.15
    )  # some 600 x 5 squares of random numbers, of relative variance 2 or so


@remedy("returned a nested tensor that shows no sizes: make it with layout=torch.jagged")
def _nested() -> None:
    model = Forward(lambda m, x: torch.stack([row.sum(0) for row in m.l(x).unbind()]), l=nn.Linear(4, 3)).double()
    rows, y = [torch.randn(k, 4).double() for k in (2, 3, 1)], torch.randn(3, 3).double()
    with refused("make it with layout=torch.jagged"):
        monitored(model, lambda: step(model, torch.nested.nested_tensor(rows), y))
    truth = sum(
        float(g.square().sum()) / 3
        for row, target in zip(rows, y, strict=True)
        for g in torch.autograd.grad(numbers(model.l(row).sum(0)[None], target[None]), list(model.parameters()))
    )
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    right(monitored(model, lambda: step(model, jagged, y)), truth)


@remedy("create_graph: * has no second derivative; *")
def _no_second_derivative() -> None:
    _fused_attention()
    _fused_bags()
    _fused_distances()
    _alignments()


def _alignments() -> None:
    model, (x, y) = nn.Linear(3, 4).double(), (torch.randn(2, 6, 3).double(), torch.randint(1, 4, (2, 2)))

    def alignments(outputs: Tensor, targets: Tensor) -> Tensor:
        steps, labels = (torch.full((len(outputs),), length) for length in (6, 2))
        frames = outputs.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(frames, targets, steps, labels, reduction="none").mean()

    with refused("leave out create_graph, since torch has no other"):
        empirical_fisher_trace(model, alignments, x, y, create_graph=True)
    truth = [
        torch.autograd.grad(alignments(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters())) for n in range(2)
    ]
    total = sum(float(g.square().sum()) for grads in truth for g in grads) / 2
    assert float(empirical_fisher_trace(model, alignments, x, y)) == pytest.approx(total, rel=1e-8)


def _fused_bags() -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        h = m.e(ids) if m.fused else F.embedding(ids, m.e.weight).sum(1)
        return m.l(h)

    model = Forward(forward, e=nn.EmbeddingBag(7, 4, mode="sum"), l=nn.Linear(4, 3)).double()
    x, y = torch.randint(7, (5, 2)), torch.randn(5, 3).double()
    model.fused = True
    with refused("torch.nn.functional.embedding(ids, weight).sum(1)"):
        empirical_fisher_trace(model, numbers, x, y, create_graph=True)
    model.fused = False
    _differentiable(model, numbers, x, y)


def _fused_distances() -> None:
    model, x, y = problem()

    def fused(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cdist(outputs.unsqueeze(1), targets.unsqueeze(1)).mean()

    def plain(outputs: Tensor, targets: Tensor) -> Tensor:
        a, b = outputs.unsqueeze(1), targets.unsqueeze(1)
        return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1).mean()

    with refused("torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1)"):
        empirical_fisher_trace(model, fused, x, y, create_graph=True)
    assert float(plain(model(x), y)) == pytest.approx(float(fused(model(x), y)), rel=1e-12)
    _differentiable(model, plain, x, y)


def _differentiable(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> None:
    """The trace's gradient is that of the trace by plain autograd."""
    parameters, truth = list(model.parameters()), torch.zeros(()).double()
    for n in range(len(x)):
        loss = loss_fn(model(x[n : n + 1]), y[n : n + 1])
        truth = truth + sum(g.square().sum() for g in torch.autograd.grad(loss, parameters, create_graph=True)) / len(x)
    found = empirical_fisher_trace(model, loss_fn, x, y, create_graph=True)
    assert float(found) == pytest.approx(float(truth), rel=1e-8)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), torch.autograd.grad(truth, parameters))


def _fused_attention() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.l(x)[:, None]
        return m.head(F.scaled_dot_product_attention(h, h, h)[:, 0].mean(1))

    model, x, _ = drawn(Forward(forward, l=nn.Linear(4, 4), head=nn.Linear(4, 3)), 5, 6, 4)
    with refused("SDPBackend.MATH"):
        generalized_fisher_trace(model, model(x), None, "mse", create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        found = generalized_fisher_trace(model, model(x), None, "mse", create_graph=True)
    assert found.requires_grad
    truth = float(total(exact_fisher(model, x, loss_type="mse")) / len(x))
    assert float(found) == pytest.approx(truth, rel=1e-8)


@remedy("the loss neither averages nor sums over the batch: an average")
def _output_of_all_samples() -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.table, self.expands = nn.Linear(3, 2), nn.Embedding(4, 2), False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            prototypes = self.table(torch.tensor([3, 1, 0, 2]))
            return self.features(x), prototypes.expand(len(x), -1, -1) if self.expands else prototypes

    def loss_fn(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        features, prototypes = outputs
        return nn.functional.cross_entropy(-(features[:, None] - prototypes).square().sum(2), y)

    model, x, y = Prototypes().double(), torch.randn(4, 3).double(), torch.arange(4)
    with refused("return it once for each sample, as x.expand(n, ...) does"):
        empirical_fisher_trace(model, loss_fn, x, y)
    model.expands = True
    rows = [torch.autograd.grad(loss_fn(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters())) for n in range(4)]
    truth = sum(float(g.square().sum()) for row in rows for g in row) / 4
    assert float(empirical_fisher_trace(model, loss_fn, x, y)) == pytest.approx(truth, rel=1e-8)


@remedy("since it takes no other number of samples")
def _loss_of_all_samples() -> None:
    model, x, y = problem()
    weights = torch.rand(len(x), 1).double()
    by_sample = [{"numbers": one} for one in y]
    with refused("with its targets, in tensors with a row for each sample"):
        empirical_fisher_trace(model, lambda o, y: (weights * (o - y).square()).sum(), x, y)
    truth = 0.0
    for n in range(len(x)):
        loss = (weights[n] * (model(x[n : n + 1]) - y[n]).square()).sum()
        truth += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
    found = empirical_fisher_trace(model, lambda o, y: (y[1] * (o - y[0]).square()).sum(), x, (y, weights))
    assert float(found) == pytest.approx(truth, rel=1e-8)

    def sum_of_list(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return of_list(outputs, targets) * len(targets)

    def of_list(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([numbers(outputs[n : n + 1], one["numbers"][None]) for n, one in enumerate(targets)]).mean()

    for loss_fn, scale in ((of_list, 1), (sum_of_list, len(x))):
        with refused("say so by batch_axis={'targets': 'list'}"):
            empirical_fisher_trace(model, loss_fn, x, by_sample)
        found = empirical_fisher_trace(model, loss_fn, x, by_sample, batch_axis={"targets": "list"})
        assert float(found) == pytest.approx(scale * expected(model, x, y), rel=1e-8)

    class StepsFirst(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1)

    def of_steps(outputs: Tensor, targets: Tensor) -> Tensor:  # [steps, samples, classes] and [samples, steps]
        return nn.functional.cross_entropy(outputs.permute(1, 2, 0), targets, reduction="sum")

    steps, xs, ys = StepsFirst(nn.Linear(3, 2)).double(), torch.randn(4, 4, 3).double(), torch.randint(2, (4, 4))
    with refused("name both, as in batch_axis={'outputs': 1, 'targets': 0}"):
        empirical_fisher_trace(steps, of_steps, xs, ys, batch_axis={"outputs": 1})
    found = empirical_fisher_trace(steps, of_steps, xs, ys, batch_axis={"outputs": 1, "targets": 0})
    losses = [of_steps(steps(xs[n : n + 1]), ys[n : n + 1]) for n in range(len(xs))]
    rows = [torch.autograd.grad(one, list(steps.parameters())) for one in losses]
    assert float(found) == pytest.approx(sum(float(g.square().sum()) for row in rows for g in row), rel=1e-8)
