"""The ways into the library. Each runs a problem, compares what it says, and raises `Wrong`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import truth
from fuzz.comparison import Inconsistent, Wrong, difference, require_equal
from fuzz.losses import logits, tokens
from fuzz.registry import way
from fuzz.truth import Loss, Rows, squared_norms
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_results, generalized_fisher_trace
from torch_secorder.pruning import Gates


@dataclass
class Problem:
    """A model with batches and a loss, and an equal model for plain autograd."""

    model: nn.Module
    twin: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss: Loss
    reduction: str
    dtype: str
    updates: bool
    coupled: bool
    verified: bool  # by the monitor: coupled losses are found in no other way
    axis: int
    options: dict[str, Any]

    def expected(self, x: Tensor, y: Tensor, named: dict[str, Tensor] | None = None) -> Rows:
        """Every sample's gradients; alone and in the batch are the same, unless samples are coupled."""
        self.twin.load_state_dict(self.model.state_dict())
        named = named or {k: p for k, p in self.twin.named_parameters() if p.requires_grad}
        there = truth.in_batch(self.twin, named, self.loss, x, y, self.dtype)
        apart = truth.alone(self.twin, named, self.loss, x, y, self.dtype, self.axis)
        if apart is not None and not self.coupled:
            a, b = squared_norms(apart), squared_norms(there)
            for name in a:
                try:
                    require_equal(name, b[name], a[name], sum(a.values()), self.dtype)
                except Wrong as wrong:
                    raise Inconsistent(str(wrong), wrong.off) from None
        return there

    def spread(self) -> float:
        """By how much plain autograd's own numbers change where inputs and parameters change by their rounding."""
        named = {k: p for k, p in self.twin.named_parameters() if p.requires_grad}
        given = {k: v.clone() for k, v in self.twin.state_dict().items()}
        found = []
        for x, y in self.batches:
            before = squared_norms(truth.in_batch(self.twin, named, self.loss, x, y, self.dtype))
            for seed in range(3):
                moved = truth.moved_by_rounding(self.twin, x, self.dtype, seed)
                after = squared_norms(truth.in_batch(self.twin, named, self.loss, moved, y, self.dtype))
                self.twin.load_state_dict(given)
                total = sum(before.values())
                found += [difference(after[k], before[k], total, self.precision) for k in before]
        return max(found, default=0.0)

    def scalar(self, out: Any, y: Tensor) -> Tensor:
        """The loss as a user writes it."""
        return self.loss(out, y)[0]

    def __post_init__(self) -> None:
        if self.axis:
            batch_first = self.loss
            self.loss = lambda out, y: batch_first(out.transpose(0, 1), y)

    def outputs(self, x: Tensor) -> Any:
        return truth.running(self.model, x, self.dtype)

    def require(self, what: str, got: dict[str, Any], expected: dict[str, Tensor], total: Any) -> None:
        """Raises unless both have the same names and numbers."""
        if list(got) != list(expected):
            raise Wrong(f"{what}: got {list(got)}, expected {list(expected)}")
        for name in got:
            require_equal(f"{what} of {name}", got[name], expected[name], total, self.precision)

    @property
    def precision(self) -> str:
        """How near numbers have to be."""
        return "weakly coupled" if self.coupled and self.dtype == "float64" else self.dtype

    @property
    def batch_axis(self) -> Any:
        return {"inputs": self.axis, "outputs": self.axis, "targets": 0} if self.axis else None

    def pooled(self) -> tuple[dict[str, Tensor], float]:
        """t_{n,p} of all batches, and what their sum is multiplied by."""
        each = [squared_norms(self.expected(x, y)) for x, y in self.batches]
        t = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        return t, 1.0 if self.reduction == "sum" else 1 / sum(len(y) for _, y in self.batches)


@way()
def monitor(problem: Problem) -> None:
    """The user's own loop, in which gradients must be as without the monitor."""
    options = dict(problem.options)
    everything = options["parameters"] == "all"
    hooks = _hooks(problem.model)
    watched = FisherMonitor(problem.model, problem.reduction, batch_axis=problem.batch_axis, **options)
    named = {k: p for k, p in problem.twin.named_parameters() if everything or p.requires_grad}
    frozen = [p for p in named.values() if not p.requires_grad]
    ts, diagonals, norms = [], [], dict.fromkeys(named, 0.0)
    for p in frozen:
        p.requires_grad_(True)
    with watched:
        for number, (x, y) in enumerate(problem.batches):
            expected = problem.expected(x, y, named)
            _step(problem, watched, x, y, verify=problem.verified and number == 0)
            for k, p in problem.model.named_parameters():
                if k in norms and p.grad is not None:
                    norms[k] += (p.grad.double().norm() / options["loss_scale"]).square() / len(problem.batches)
            t, total = squared_norms(expected), sum(squared_norms(expected).values())
            if options["per_sample"]:
                got = {k: watched.per_sample[k].to_numpy()[-len(y) :] for k in watched.per_sample}
                problem.require(f"monitor, t in step {number + 1}", got, t, total)
            ts.append(t)
            diagonals.append({k: g.square().sum(0) for k, g in expected.items()})
            _updated(problem)
    c = 1.0 if problem.reduction == "sum" else 1 / sum(len(y) for _, y in problem.batches)
    traces = {k: c * sum(t[k].sum() for t in ts) for k in named}
    problem.require("monitor, fisher_trace", dict(watched.report()["fisher_trace"]), traces, sum(traces.values()))
    # Parameters without a gradient have none, and what re-entrant checkpoints tear apart has one that is not known.
    squares = dict(watched.report()["grad_sq_norm"].dropna())
    problem.require("monitor, grad_sq_norm", squares, {k: norms[k] for k in squares}, sum(norms.values()))
    if options["diagonal"]:
        diagonal = {k: c * sum(d[k] for d in diagonals) for k in named}
        problem.require("monitor, diagonal", watched.diagonal, diagonal, sum(traces.values()))
    if _hooks(problem.model) != hooks:
        raise Wrong("monitor: hooks are left")


def _step(problem: Problem, watched: FisherMonitor, x: Tensor, y: Tensor, *, verify: bool) -> None:
    """One pass of the model under the monitor, and whether .grad is as the twin's, which runs without it."""
    scale = problem.options["loss_scale"]
    problem.model.zero_grad()
    problem.twin.zero_grad()
    trainable = {k: p.requires_grad for k, p in problem.model.named_parameters()}
    before = {k: p.requires_grad for k, p in problem.twin.named_parameters()}
    for k, p in problem.twin.named_parameters():
        p.requires_grad_(trainable[k])
    (problem.scalar(truth.running(problem.twin, x, problem.dtype), y) * scale).backward()
    for k, p in problem.twin.named_parameters():
        p.requires_grad_(before[k])
    out = problem.outputs(x)
    loss = problem.scalar(out, y) * scale
    if verify:
        watched.verify(loss)
    loss.backward()
    for (k, p), q in zip(problem.model.named_parameters(), problem.twin.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None) or (p.grad is not None and not torch.equal(p.grad, q.grad)):
            raise Wrong(f"monitor: .grad of {k} is another with the monitor")


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _updated(problem: Problem) -> None:
    for p in problem.model.parameters() if problem.updates else ():
        if p.grad is not None:
            p.data -= 0.1 / problem.options["loss_scale"] * p.grad


@way()
def report(problem: Problem) -> None:
    """fisher_results over all batches, verified, with every sample's numbers and the diagonal."""
    t, c = problem.pooled()
    with truth.precision(problem.batches[0][0], problem.dtype):
        found = fisher_results(
            *(problem.model, problem.scalar, problem.batches),
            per_sample=True,
            diagonal=problem.options["diagonal"],
            batch_axis=problem.batch_axis,
            max_memory=problem.options["max_memory"],
            reduction=problem.reduction,
            progress=False,
        )
    got = {k: found.per_sample[k].to_numpy() for k in found.per_sample}
    problem.require("fisher_results, t", got, t, sum(t.values()))
    traces = {k: c * each.sum() for k, each in t.items()}
    problem.require("fisher_report", dict(found.report()["fisher_trace"]), traces, sum(traces.values()))
    _require_untouched(problem)


@way()
def sums(problem: Problem) -> None:
    """The sums of the diagonal over rows and over columns, of matrices; by the monitor in the loop, and by fisher_results."""
    matrices = {k for k, p in problem.model.named_parameters() if p.requires_grad and p.dim() == 2}
    asked = {k: ("rows", "columns")[place % 2] for place, k in enumerate(sorted(matrices))}
    if not asked:
        return
    expected = dict.fromkeys(asked, 0.0)
    largest = 0.0
    for x, y in problem.batches:
        for k, g in problem.expected(x, y).items():
            largest += g.square().sum()
            if k in asked:
                expected[k] += g.square().sum((0, 2 if asked[k] == "rows" else 1))
    c = 1.0 if problem.reduction == "sum" else 1 / sum(len(y) for _, y in problem.batches)
    expected = {k: c * value for k, value in expected.items()}
    options = {"diagonal": asked, "batch_axis": problem.batch_axis, "max_memory": problem.options["max_memory"]}
    with FisherMonitor(problem.model, problem.reduction, **options) as watched:
        for number, (x, y) in enumerate(problem.batches):
            loss = problem.scalar(problem.outputs(x), y)
            if problem.verified and number == 0:
                watched.verify(loss)
            loss.backward()
    found = {k: watched.diagonal[k] for k in expected}
    problem.require("monitor, sums", found, expected, c * largest)
    problem.model.zero_grad()
    with truth.precision(problem.batches[0][0], problem.dtype):
        results = fisher_results(
            problem.model, problem.scalar, problem.batches, reduction=problem.reduction, progress=False, **options
        )
    problem.require("fisher_results, sums", {k: results.diagonal[k] for k in expected}, expected, c * largest)
    _require_untouched(problem)


@way()
def activations(problem: Problem) -> None:
    """The squared norms of gradients in the outputs of all modules, by the monitor in the loop."""
    if problem.coupled:
        return
    problem.twin.load_state_dict(problem.model.state_dict())
    expected: dict[str, Any] = {}
    c = 1.0 if problem.reduction == "sum" else 1 / sum(len(y) for _, y in problem.batches)
    for x, y in problem.batches:
        with _beside_outputs(problem.twin) as beside:
            shares = problem.loss(truth.running(problem.twin, x, problem.dtype), y)[1]
        for share in shares:
            try:
                grads = torch.autograd.grad(share, [e for _, e in beside], allow_unused=True, retain_graph=True)
            except RuntimeError:  # of a re-entrant checkpoint, which allows nothing but backward()
                return
            for (name, _), grad in zip(beside, grads, strict=True):
                if grad is not None:
                    expected[name] = expected.get(name, 0.0) + c * grad.abs().double().square().sum()
    with FisherMonitor(problem.model, problem.reduction, batch_axis=problem.batch_axis, activations=True) as watched:
        for x, y in problem.batches:
            problem.scalar(problem.outputs(x), y).backward()
    problem.model.zero_grad()
    found, total = dict(watched.activations["activation_trace"]), sum(expected.values())
    for name in sorted({*found, *expected}):
        require_equal(f"activations of {name}", found.get(name, 0.0), expected.get(name, 0.0), total, problem.precision)


@contextlib.contextmanager
def _beside_outputs(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Adds zeros of their own to the outputs of all modules, whose gradients are the outputs' whatever happens to these."""
    beside: list[tuple[str, Tensor]] = []

    def with_zeros(name: str, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        beside.append((name, torch.zeros_like(output, requires_grad=True)))
        return output + beside[-1][1]

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: with_zeros(name, output))
        for name, module in model.named_modules()
    ]
    yield beside
    for handle in handles:
        handle.remove()


@way()
def gates(problem: Problem) -> None:
    """Gates on the outputs of linear layers, against masks that the outputs are really multiplied by."""
    if problem.coupled or any(not p.requires_grad for p in problem.twin.parameters()):
        return
    layers = [name for name, module in problem.model.named_modules() if type(module) is nn.Linear]
    if not layers:
        return
    watched = Gates(problem.model, lambda name: name in layers, problem.reduction, batch_axis=problem.batch_axis)
    with watched:
        for x, y in problem.batches:
            problem.scalar(problem.outputs(x), y).backward()
    problem.model.zero_grad()
    problem.twin.load_state_dict(problem.model.state_dict())
    expected, masks = dict.fromkeys(layers, 0.0), {}
    dtype = next(problem.twin.parameters()).dtype
    handles = []
    for name in layers:
        module = problem.twin.get_submodule(name)
        masks[name] = torch.ones(module.out_features, dtype=dtype, requires_grad=True)
        handles.append(
            module.register_forward_hook(lambda module, args, output, mask=masks[name]: output * mask.to(output.dtype))
        )
    for x, y in problem.batches:
        for name, g in truth.in_batch(problem.twin, masks, problem.loss, x, y, problem.dtype).items():
            expected[name] += g.square().sum(0) / sum(len(y) for _, y in problem.batches)
    for handle in handles:
        handle.remove()
    found = watched.fisher if watched.n_samples else {name: torch.zeros_like(mask) for name, mask in masks.items()}
    problem.require("gates", found, expected, sum(value.sum() for value in expected.values()))


@way()
def empirical(problem: Problem) -> None:
    """empirical_fisher_trace of each batch, called twice, since what is known after the first call is used by the second."""
    if problem.axis:
        return
    for x, y in [*problem.batches, problem.batches[0]]:
        c = 1.0 if problem.reduction == "sum" else 1 / len(y)
        expected = c * sum(t.sum() for t in squared_norms(problem.expected(x, y)).values())
        with truth.precision(problem.batches[0][0], problem.dtype):
            got = empirical_fisher_trace(problem.model, problem.scalar, x, y)
        require_equal("empirical_fisher_trace", got, expected, expected, problem.precision)
    _require_untouched(problem)


@way()
def differentiated(problem: Problem) -> None:
    """The gradient of empirical_fisher_trace, by which it is penalized, against autograd's of the sum of squares."""
    if problem.axis or problem.coupled or problem.dtype != "float64":
        return
    problem.twin.load_state_dict(problem.model.state_dict())
    (x, y), named = problem.batches[0], _named(problem)
    parameters, total = list(named.values()), torch.zeros((), dtype=torch.float64)
    try:
        for share in problem.loss(problem.twin(x), y)[1]:
            grads = torch.autograd.grad(share, parameters, create_graph=True, allow_unused=True)
            total = total + sum(g.abs().square().sum() for g in grads if g is not None)
        total = total if problem.reduction == "sum" else total / len(y)
        expected = _gradients(total, parameters)
    except RuntimeError:  # of re-entrant checkpoints, and of nodes without a second derivative
        return
    trace = empirical_fisher_trace(problem.model, problem.scalar, x, y, create_graph=True)
    got = _gradients(trace, [p for p in problem.model.parameters() if p.requires_grad])
    size = sum(float(g.abs().square().sum()) for g in expected) ** 0.5
    if not math.isfinite(size):
        return  # torch's own second derivative of logcumsumexp is NaN or wrong, and there are roots of zero
    for name, a, b in zip(named, got, expected, strict=True):
        apart = (a - b).abs().flatten()
        if a.numel() and not float(apart.max()) <= 1e-6 * size + 1e-14:  # Second derivatives amplify rounding.
            got, wanted = (float(x.flatten()[apart.argmax()]) for x in (a, b))
            raise Wrong(
                f"gradient of the trace in {name}: got {got:.9g}, expected {wanted:.9g}; the norm of all is {size:.3g}"
            )


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@way()
def exact(problem: Problem) -> None:
    """The Fisher with labels integrated out, through the graph of outputs that are there, and by fisher_results."""
    if problem.axis or problem.dtype == "autocast" or problem.coupled:
        return
    x = problem.batches[0][0]
    problem.twin.load_state_dict(problem.model.state_dict())
    out = truth.running(problem.twin, x, problem.dtype)
    pooled = isinstance(out, dict) or out.dim() == 2
    f = logits(out) if pooled else tokens(out)
    t = _of_classes(problem, f) if pooled else _of_elements(problem, f)
    expected, kind = sum(t.values()) / len(x), "nll" if pooled else "mse"
    outputs = problem.model(x)
    got = generalized_fisher_trace(problem.model, logits(outputs) if pooled else tokens(outputs), None, kind)
    require_equal("generalized_fisher_trace", got, expected, expected, problem.dtype)
    found = fisher_results(problem.model, None, (x, None), fisher="exact", loss_type=kind, progress=False)
    traces = {k: v / len(x) for k, v in t.items()}
    problem.require("fisher_results, exact", dict(found.report()["fisher_trace"]), traces, expected)
    _require_untouched(problem)


def _named(problem: Problem) -> dict[str, Tensor]:
    return {k: p for k, p in problem.twin.named_parameters() if p.requires_grad}


def _of_classes(problem: Problem, f: Tensor) -> dict[str, Tensor]:
    """By parameter, the sum over samples and labels of p(label) ||gradient of log p(label)||^2."""
    p, named = f.softmax(1).detach().double(), _named(problem)
    each = [squared_norms(truth.rows(named, list(f.log_softmax(1)[:, k]))) for k in range(f.shape[1])]
    return {name: sum((t[name] * p[:, k]).sum() for k, t in enumerate(each)) for name in named}


def _of_elements(problem: Problem, f: Tensor) -> dict[str, Tensor]:
    """By parameter, the sum over the outputs' elements of their squared gradients."""
    return {name: t.sum() for name, t in squared_norms(truth.rows(_named(problem), list(f.flatten()))).items()}


def _require_untouched(problem: Problem) -> None:
    if any(p.grad is not None for p in problem.model.parameters()):
        raise Wrong("a function wrote .grad")
