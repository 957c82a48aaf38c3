"""Refusals of a user's model or loop: what is refused, and every remedy that the message names, against a loop over samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from oracles import exact_fisher, total
from problems._base import Forward
from remedies.registry import remedy
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    fisher_results,
    generalized_fisher_trace,
    hessian_trace,
)
from torch_secorder.errors import CurvatureError
from traps.exactness import assert_exact, drawn, numbers


@contextmanager
def refused(words: str) -> Iterator[None]:
    with pytest.raises(CurvatureError) as caught:
        yield
    assert words in str(caught.value), str(caught.value)


def linear(i: int = 4, o: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(i, 5), nn.Tanh(), nn.Linear(5, o))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    return drawn(linear(), 5, 4)


def monitored(model: nn.Module, step: Callable[[], Any], **options: Any) -> FisherMonitor:
    with FisherMonitor(model, **options) as monitor:
        step()
    return monitor


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    numbers(model(x), y).backward()


def expected(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The total by plain autograd, a sample at a time."""
    found = 0.0
    for n in range(len(x)):
        loss = numbers(model(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found += sum(float(g.square().sum()) for g in gradients if g is not None) / len(x)
    return found


def right(monitor: Any, truth: float) -> None:
    assert float(monitor.trace) == pytest.approx(truth, rel=1e-8)


# What surrounds a call


@remedy("a generator, zip or iterator that was used before has none left")
def _used_up() -> None:
    model, x, y = problem()

    def made() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(2), y.split(2), strict=True)

    used = made()
    fisher_report(model, numbers, used, progress=False)
    with refused("make it anew, or pass a list or a loader"):
        fisher_report(model, numbers, used, progress=False)
    for data in (made(), list(made())):
        found = float(fisher_report(model, numbers, data, progress=False)["fisher_trace"].sum())
        assert found == pytest.approx(expected(model, x, y), rel=1e-8)


@remedy("compute them outside of torch.no_grad()")
def _no_grad() -> None:
    model, x, _ = problem()
    with torch.no_grad(), refused("outside of torch.no_grad()"):
        generalized_fisher_trace(model, model(x), None, "mse")
    with torch.no_grad():
        outputs = model(x)
    with refused("outside of torch.no_grad()"):
        generalized_fisher_trace(model, outputs, None, "mse")
    found = generalized_fisher_trace(model, model(x), None, "mse")
    assert float(found) == pytest.approx(float(total(exact_fisher(model, x, loss_type="mse")) / len(x)), rel=1e-8)


@remedy("forbids gradients: call this outside of it")
def _inference() -> None:
    model, x, y = problem()
    for function in (empirical_fisher_trace, hessian_trace):
        with torch.inference_mode(), refused("outside of it"):
            function(model, numbers, x, y)
    assert float(empirical_fisher_trace(model, numbers, x, y)) == pytest.approx(expected(model, x, y), rel=1e-8)


@remedy("this monitor is active already; leave its block first, or use a second monitor")
def _active() -> None:
    model, x, y = problem()
    monitor = FisherMonitor(model)
    with monitor, refused("active already"), monitor:
        pass
    with monitor:
        step(model, x, y)
    right(monitor, expected(model, x, y))
    monitor.reset()
    with monitor, FisherMonitor(model) as second:
        step(model, x, y)
    right(monitor, expected(model, x, y))
    right(second, expected(model, x, y))


@remedy("a monitor belongs to its model and is not copied")
def _copied() -> None:
    model, x, y = problem()
    monitor = monitored(model, lambda: step(model, x, y))
    with pytest.raises(TypeError, match="is not copied"):
        copy.deepcopy(monitor)
    other = FisherMonitor(model)
    other.load_state_dict(monitor.state_dict())
    right(other, expected(model, x, y))
    assert monitor.report()["fisher_trace"].sum() == pytest.approx(expected(model, x, y), rel=1e-8)


@remedy("was not asked for: pass *=True to FisherMonitor or fisher_results")
def _not_asked_for() -> None:
    model, x, y = problem()
    for name in ("diagonal", "per_sample", "activations"):
        with refused(f"pass {name}=True"):
            getattr(monitored(model, lambda: step(model, x, y)), name)
    monitor = monitored(model, lambda: step(model, x, y), diagonal=True)
    results = fisher_results(model, numbers, (x, y), diagonal=True, progress=False)
    for found in (monitor, results):
        assert float(sum(d.sum() for d in found.diagonal.values())) == pytest.approx(expected(model, x, y), rel=1e-8)


@remedy("these statistics have samples in common")
def _merged_twice() -> None:
    model, x, y = problem()
    first, second = (monitored(model, lambda: step(model, x, y)) for _ in range(2))
    state = FisherMonitor(model)
    state.load_state_dict(first.state_dict())
    for other in (first, state):
        with refused("samples in common"):
            first.merge(other)
    with first:
        step(model, x, y)
    right(second.merge(first), expected(model, x, y))
    assert second.n_samples == 3 * len(x)


@remedy("verify: the model's outputs are gone: write outputs = model(inputs)")
def _verify_without_outputs() -> None:
    model, x, y = problem()
    with FisherMonitor(model) as monitor:
        with refused("the model's outputs are gone"):
            monitor.verify(numbers(model(x), y))
        outputs = model(x)
        loss = numbers(outputs, y)
        monitor.verify(loss)
        loss.backward()
    right(monitor, expected(model, x, y))


@remedy("verify goes before backward(), and the backward pass through")
def _verify_after_backward() -> None:
    for kept in (False, True):
        model, x, y = problem()
        with FisherMonitor(model) as monitor:
            outputs = model(x)
            loss = numbers(outputs, y)
            if not kept:
                del outputs
            loss.backward()
            with refused("verify goes before backward"):
                monitor.verify(loss)
            monitor.reset()
            outputs = model(x)
            loss = numbers(outputs, y)
            monitor.verify(loss)
            loss.backward()
        right(monitor, expected(model, x, y))


@remedy("verify: the model was not called with a gradient in this block")
def _verify_without_a_call() -> None:
    model, x, y = problem()
    outputs = model(x)
    with FisherMonitor(model) as monitor:
        with refused("was not called with a gradient in this block"):
            monitor.verify(numbers(outputs, y))
        with torch.no_grad():
            outputs = model(x)
        with refused("outside of torch.no_grad"):
            monitor.verify(numbers(outputs, y))
        outputs = model(x)
        loss = numbers(outputs, y)
        monitor.verify(loss)
        loss.backward()
    right(monitor, expected(model, x, y))


@remedy("verify: outside of the monitor's block nothing is watched: write it inside")
def _verify_outside() -> None:
    model, x, y = problem()
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = numbers(outputs, y)
        monitor.verify(loss)
        loss.backward()
    with refused("outside of the monitor's block"):
        monitor.verify(loss)
    right(monitor, expected(model, x, y))


@remedy("generalized_fisher_trace takes the model's outputs and no loss function")
def _loss_before_outputs() -> None:
    model, x, _ = problem()
    labels = torch.randint(3, (len(x),))
    with refused("pass (model, model(inputs), targets)"):
        generalized_fisher_trace(model, nn.CrossEntropyLoss(), x, labels)
    with refused("outputs = model(inputs), and pass these, not the inputs"):
        generalized_fisher_trace(model, x, labels)
    found = generalized_fisher_trace(model, model(x), labels)
    torch.testing.assert_close(
        found, total({n: v.mean() for n, v in exact_fisher(model, x).items()}), rtol=1e-8, atol=0
    )


# Parameters and modules


@remedy("not initialized yet; run the model once before analyzing it")
def _lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh()).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with refused("run the model once"):
        FisherMonitor(model)
    model(x)
    assert_exact(model, x, y)


@remedy("on the meta device, without numbers; load the weights first")
def _meta() -> None:
    trained, x, y = problem()
    with torch.device("meta"):
        model = linear().double()
    with refused("load the weights first"):
        FisherMonitor(model)
    model.load_state_dict(trained.state_dict(), assign=True)
    assert_exact(model, x, y)


@remedy("scale_grad_by_freq=True divides gradients")
def _by_frequency() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 3)).double()
    ids, y = torch.randint(5, (6, 3)), torch.randn(6, 3).double()
    with refused("set it to False"):
        monitored(model, lambda: step(model, ids, y))
    model[0].scale_grad_by_freq = False
    assert_exact(model, ids, y)


@remedy("normalizes with the statistics of the whole batch")
def _batch_norm() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), 6, 4)
    model.train()
    with refused("call model.eval()"):
        monitored(model, lambda: step(model, x, y))
    model.eval()
    assert_exact(model, x, y)
    model[1] = nn.GroupNorm(2, 4).double()
    assert_exact(model.train(), x, y)


@remedy("in a function or in scripted code, normalizes with the statistics")
def _functional_batch_norm() -> None:
    norms: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "mode": lambda m, h: F.batch_norm(h, m.norm.running_mean, m.norm.running_var, training=m.training),
        "off": lambda m, h: F.batch_norm(h, m.norm.running_mean, m.norm.running_var, training=False),
        "groups": lambda m, h: F.group_norm(h, 2),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(norms[m.way](m, m.first(x)))

    model = Forward(forward, first=nn.Linear(4, 4), norm=nn.BatchNorm1d(4, affine=False).eval(), last=nn.Linear(4, 3))
    model.way = "mode"
    model, x, y = drawn(model.eval(), 6, 4)
    model.train()
    model.norm.eval()
    with refused("call model.eval(), or pass training=False with running statistics, or use a norm of each sample"):
        monitored(model, lambda: step(model, x, y))
    for model.way in ("off", "groups"):
        assert_exact(model, x, y)
    model.way = "mode"
    assert_exact(model.eval(), x, y)


@remedy("too large to be squared in float32 (above 1e19: scale the loss down, or use float64)")
def _large_squares() -> None:
    model, x, y = problem()
    truth, single = expected(model, x, y), copy.deepcopy(model).float()

    def large(m: nn.Module, x: Tensor, y: Tensor, scale: float) -> None:
        (scale * numbers(m(x), y)).backward()

    with refused("scale the loss down, or use float64"):
        monitored(single, lambda: large(single, x.float(), y.float(), 2.0**80), loss_scale=2.0**80)
    right = monitored(single, lambda: large(single, x.float(), y.float(), 2.0**16), loss_scale=2.0**16)
    assert float(right.trace) == pytest.approx(truth, rel=1e-4)
    wide = monitored(model, lambda: large(model, x, y, 2.0**80), loss_scale=2.0**80)
    assert float(wide.trace) == pytest.approx(truth, rel=1e-8)


@remedy("the model returned None: let its forward return what the loss is computed from")
def _returns_nothing() -> None:
    model, x, y = problem()
    silent = Forward(lambda m, x: None, inner=model)
    with refused("the model returned None"):
        fisher_report(silent, numbers, (x, y), progress=False)
    assert_exact(model, x, y)


@remedy("replaced, removed or added since the monitor was made")
def _replaced() -> None:
    model, x, y = problem()
    with FisherMonitor(model), refused("make a new monitor"):
        model[2] = nn.Linear(5, 3).double()
        step(model, x, y)
    assert_exact(model, x, y)


@remedy("frozen since the monitor was made (requires_grad_(False)); the batch is left out")
def _frozen_inside() -> None:
    model, x, y = problem()
    truth = expected(model, x, y)
    with FisherMonitor(model), refused("frozen since the monitor was made"):
        model[0].requires_grad_(False)
        step(model, x, y)
    right(monitored(model, lambda: step(model, x, y), parameters="all"), truth)


@remedy("a frozen parameter is used outside of its module's forward")
def _frozen_use() -> None:
    model, x, y = drawn(Forward(lambda m, x: F.linear(m.l(x), m.l.weight), l=nn.Linear(4, 4)), 5, 4)
    truth = expected(model, x, y)
    model.requires_grad_(False)
    with refused("let it require a gradient"):
        monitored(model, lambda: step(model, x.requires_grad_(), y), parameters="all")
    found = fisher_report(model, numbers, (x.detach(), y), parameters="all", progress=False)["fisher_trace"].sum()
    assert found == pytest.approx(truth, rel=1e-8)
    model.requires_grad_(True)
    right(monitored(model, lambda: step(model, x.detach(), y)), truth)


@remedy("its parameter '*' was replaced since the analysis began")
def _swapped() -> None:
    model, x, y = problem()
    truth = expected(model, x, y)
    model.requires_grad_(False)
    other = {name: p.detach().clone() for name, p in model.named_parameters()}
    with refused("start a new analysis"):
        call = torch.func.functional_call
        monitored(model, lambda: numbers(call(model, other, (x,)), y).backward(), parameters="all")
    right(monitored(model, lambda: step(model, x, y), parameters="all"), truth)


@remedy("its forward was replaced on the instance since the analysis began")
def _patched() -> None:
    model, x, y = problem()
    with FisherMonitor(model), refused("its forward was replaced"):
        model[0].forward = lambda x: F.linear(x, 2 * model[0].weight, model[0].bias)
        step(model, x, y)
    right(monitored(model, lambda: step(model, x, y)), expected(model, x, y))


# Where samples are


@remedy("was called outside of a call of the monitored model")
def _part() -> None:
    model = Forward(lambda m, x: m.net(x), net=linear()).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with refused("monitor the part that is called"):
        monitored(model, lambda: step(model.net[0], x, torch.randn(5, 5).double()))
    truth = expected(model, x, y)
    right(monitored(model, lambda: step(model, x, y)), truth)
    right(monitored(model.net, lambda: step(model.net, x, y)), truth)
    right(monitored(model, lambda: step(model.net, x, y), batch_axis=0), truth)


@remedy("has its batch on axis *")
def _sequence_first() -> None:
    def make(**options: Any) -> nn.Module:
        rnn = nn.GRU(4, 5, **options)
        return Forward(lambda m, x: m.head(m.rnn(x)[0]), rnn=rnn, head=nn.Linear(5, 3)).double()

    model, x, y = make(), torch.randn(6, 5, 4).double(), torch.randn(6, 5, 3).double()

    def of_columns(outputs: Tensor, targets: Tensor) -> Tensor:
        return numbers(outputs.transpose(0, 1), targets.transpose(0, 1))

    with refused("pass batch_axis=1"):
        monitored(model, lambda: of_columns(model(x), y).backward())
    monitor = monitored(model, lambda: of_columns(model(x), y).backward(), batch_axis=1)
    turned = Forward(lambda m, x: m.of(x.transpose(0, 1)).transpose(0, 1), of=model)
    right(monitor, expected(turned, x.transpose(0, 1), y.transpose(0, 1)))
    assert_exact(make(batch_first=True), x, y)
    _a_list_with_an_item_for_each_sample(5, 5)


def _a_list_with_an_item_for_each_sample(n: int, steps: int) -> None:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        return [m.head(row[: 1 + k % 3]) for k, row in enumerate(m.rnn(x)[0])]

    model = Forward(forward, rnn=nn.GRU(4, 5, batch_first=True), head=nn.Linear(5, 3)).double()
    x = torch.randn(n, steps, 4).double()

    def losses() -> list[Tensor]:
        return [one.square().sum() for one in model(x)]

    with refused("batch_axis={'outputs': 'list'}"):
        monitored(model, lambda: sum(losses()).backward())  # type: ignore[union-attr]
    found = monitored(model, lambda: sum(losses()).backward(), reduction="sum", batch_axis={"outputs": "list"})  # type: ignore[union-attr]
    each = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses()]
    right(found, sum(float(g.square().sum()) for one in each for g in one))


@remedy("carries something along axis")
def _cumulative() -> None:
    model = Forward(lambda m, x: m.head(m.l(x).tanh().cumsum(0)), l=nn.Linear(4, 5), head=nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 5, 4).double(), torch.randn(6, 5, 3).double()
    with refused("pass batch_axis="):
        monitored(model, lambda: step(model, x, y))

    def of_columns() -> None:
        numbers(model(x).transpose(0, 1), y.transpose(0, 1)).backward()

    turned = Forward(lambda m, x: m.of(x.transpose(0, 1)).transpose(0, 1), of=model)
    right(monitored(model, of_columns, batch_axis=1), expected(turned, x.transpose(0, 1), y.transpose(0, 1)))


@remedy("the loss uses an output of the model that compares samples with each other")
def _similarities() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.l(x)
        return h, h @ h.T

    model, x, y = Forward(forward, l=nn.Linear(4, 3)).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with refused("use a loss of the other outputs"):
        monitored(model, lambda: model(x)[1].square().sum().backward())
    plain = Forward(lambda m, x: m.of(x)[0], of=model)
    right(monitored(model, lambda: numbers(model(x)[0], y).backward()), expected(plain, x, y))

    def draws(m: Any, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean = m.l(x)
        return m.last(mean + noise.transpose(0, 1)), mean

    model = Forward(draws, l=nn.Linear(4, 3), last=nn.Linear(3, 2)).double()
    noise = torch.randn(5, 5, 3).double()

    def of_draws(x: Tensor, noise: Tensor) -> Tensor:
        drawn, mean = model(x, noise)
        return drawn.square().sum(2).logsumexp(0).mean() + mean.square().sum(1).mean()

    with refused("batch_axis={'outputs': {0: 1}} for the first output"):
        monitored(model, lambda: of_draws(x, noise).backward())
    losses = [of_draws(x[n : n + 1], noise[n : n + 1]) for n in range(5)]
    each = [torch.autograd.grad(one, list(model.parameters())) for one in losses]
    found = monitored(model, lambda: of_draws(x, noise).backward(), batch_axis={"outputs": {0: 1}})
    right(found, sum(float(g.square().sum()) for one in each for g in one) / 5)


@remedy("not taken for one with a row for each of the")
def _output_of_no_sample() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = m.norm.weight.exp()
        return m.l(x), scale.expand(len(x), 3) if repeats else scale

    def scaled(m: Any, x: Tensor) -> Tensor:
        return m.of(x)[0] * m.of(x)[1]

    model, repeats = Forward(forward, l=nn.Linear(4, 3), norm=nn.LayerNorm(3)).double(), False
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()

    def of_both() -> None:
        h, scale = model(x)
        numbers(h * scale, y).backward()

    with refused("use a loss of the other outputs"):
        monitored(model, of_both)
    plain = Forward(lambda m, x: m.of(x)[0], of=model)
    right(monitored(model, lambda: numbers(model(x)[0], y).backward()), expected(plain, x, y))
    repeats = True
    right(monitored(model, of_both), expected(Forward(scaled, of=model), x, y))
    _a_list_with_an_item_for_each_sample(5, 6)
    _looked_up_rows()


def _looked_up_rows() -> None:
    """Each of two samples has the nearest of two codes, which are the rows of their table in turn."""

    def quantized(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = m.encoder(x)
        nearest = m.codes(torch.cdist(z.detach(), m.codes.weight.detach()).argmin(1))
        return m.decoder(z + (nearest - z).detach()), z, nearest

    own = {"encoder": nn.Linear(4, 3), "codes": nn.Embedding(2, 3), "decoder": nn.Linear(3, 4)}
    model, x = Forward(quantized, **own).double(), torch.randn(2, 4).double()
    model.codes.weight.data.copy_(model.encoder(x) + 0.01)

    def loss(x: Tensor) -> Tensor:
        decoded, z, nearest = model(x)
        return numbers(decoded, x) + numbers(nearest, z.detach()) + numbers(z, nearest.detach()) / 4

    each = [torch.autograd.grad(loss(x[n : n + 1]), list(model.parameters())) for n in range(2)]
    with refused("say so by batch_axis={'outputs': 0}"):
        monitored(model, lambda: loss(x).backward())
    found = monitored(model, lambda: loss(x).backward(), batch_axis={"outputs": 0})
    right(found, sum(float(g.square().sum()) for grads in each for g in grads) / 2)


# Losses


@remedy("the numbers can't be checked, since the loss has no gradient in any output")
def _loss_inside() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        outputs = m.net(x)
        each = (outputs - y).square().sum(1)
        return {"parts": torch.stack([each.mean(), 0 * each.sum()]), "logits": outputs, "losses": each}

    model, x, y = Forward(forward, net=linear()).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    truth = expected(model.net, x, y)

    def report(loss_fn: Callable[[Any, Any], Tensor], **options: Any) -> float:
        return fisher_report(model, loss_fn, ((x, y), y), progress=False, **options)["fisher_trace"].sum()

    with refused("computed inside the model"):
        report(lambda outputs, _: outputs["parts"].sum())
    assert report(lambda outputs, targets: numbers(outputs["logits"], targets)) == pytest.approx(truth, rel=1e-8)
    assert report(lambda outputs, _: outputs["losses"].mean()) == pytest.approx(truth, rel=1e-8)
    assert report(lambda outputs, _: outputs["parts"].sum(), verify=False) == pytest.approx(truth, rel=1e-8)


@remedy("the loss must be a scalar, not of shape")
def _no_scalar() -> None:
    model, x, y = problem()
    with refused("average or sum it"):
        empirical_fisher_trace(model, nn.MSELoss(reduction="none"), x, y)
    for loss_fn, scale in ((numbers, 1), (lambda o, y: numbers(o, y) * len(o), len(x))):
        found = float(empirical_fisher_trace(model, loss_fn, x, y))
        assert found == pytest.approx(scale * expected(model, x, y), rel=1e-8)


@remedy("a penalty on weights belongs to no sample")
def _penalty() -> None:
    model, x, y = problem()
    with refused("leave it out of the loss"):
        empirical_fisher_trace(model, lambda o, y: numbers(o, y) + model[0].weight.square().sum(), x, y)
    assert float(empirical_fisher_trace(model, numbers, x, y)) == pytest.approx(expected(model, x, y), rel=1e-8)

    def scaled(m: Any, x: Tensor) -> Tensor:  # a weight that belongs to the samples' losses, used in the forward
        return m.net(x) * m.net[0].weight.sum()

    assert_exact(Forward(scaled, net=model), x, y)


@remedy("in which no tensor with a gradient is seen")
def _distribution() -> None:
    def policy(m: Any, x: Tensor) -> Any:
        return torch.distributions.Categorical(logits=m.net(x))

    model, x, y = Forward(policy, net=linear()).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    with refused("return what the loss is computed from"):
        empirical_fisher_trace(model, lambda o, y: -o.log_prob(y).mean(), x, y)
    with refused("return what the loss is computed from"):
        monitored(model, lambda: (-model(x).log_prob(y).mean()).backward())
    logits = Forward(lambda m, x: m.net(x), net=model.net)
    assert_exact(logits, x, y, lambda o, y: -torch.distributions.Categorical(logits=o).log_prob(y).mean())


@remedy("the loss reaches it by another way than through what the model returns")
def _aside() -> None:
    aside: list[Tensor] = []

    def forward(m: Any, x: Tensor) -> Any:
        aside[:] = [m.two(x)]
        return m.one(x) if m.hides else (m.one(x), *aside)

    model = Forward(forward, one=nn.Linear(4, 3), two=nn.Linear(4, 3)).double()
    model.hides, x, y = True, torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with refused("return what the loss is computed from"):
        monitored(model, lambda: (numbers(model(x), y) + numbers(aside[0], y)).backward())
    model.hides = False

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return numbers(outputs[0], targets) + numbers(outputs[1], targets)

    assert_exact(model, x, y, loss)


@remedy("a likelihood takes real outputs, not complex ones: return torch.view_as_real(outputs)")
def _complex() -> None:
    model, x, _ = drawn(nn.Linear(4, 6), 5, 4)
    complex_outputs = Forward(lambda m, x: torch.view_as_complex(m.of(x).unflatten(1, (3, 2)).contiguous()), of=model)
    with refused("view_as_real"):
        fisher_report(complex_outputs, None, (x, None), fisher="exact", loss_type="mse", progress=False)
    real = Forward(lambda m, x: torch.view_as_real(m.of(x)), of=complex_outputs)
    found = fisher_report(real, None, (x, None), fisher="exact", loss_type="mse", progress=False)["fisher_trace"].sum()
    assert found == pytest.approx(float(total(exact_fisher(model, x, loss_type="mse")) / len(x)), rel=1e-8)


# Several passes


@remedy("a second backward pass went through the same forward")
def _two_passes() -> None:
    model = Forward(lambda m, x: (m.net(x), m.other(x)), net=linear(), other=linear()).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()

    def losses() -> list[Tensor]:
        return [numbers(outputs, y) for outputs in model(x)]

    def separate() -> None:
        first, second = losses()
        first.backward()
        second.backward()

    with refused("add the losses and differentiate their sum"):
        monitored(model, separate)
    truth = expected(model.net, x, y) + expected(model.other, x, y)
    right(monitored(model, lambda: sum(losses()).backward()), truth)
    right(monitored(model, lambda: torch.autograd.backward(losses())), truth)
    right(monitored(model, separate, repeated_calls="new"), truth / 2)

    def again() -> None:
        losses()[0].backward()
        losses()[1].backward()

    right(monitored(model, again), truth / 2)


@remedy("one backward pass reached two calls of the model")
def _two_calls() -> None:
    model, x, y = problem()
    other = torch.randn(5, 4).double()
    with refused('repeated_calls="same"'):
        monitored(model, lambda: numbers(model(x) - model(other), y).backward())
    siamese = Forward(lambda m, pair: m.of(pair[:, 0]) - m.of(pair[:, 1]), of=model)
    monitor = monitored(model, lambda: numbers(model(x) - model(other), y).backward(), repeated_calls="same")
    right(monitor, expected(siamese, torch.stack([x, other], 1), y))
    both = monitored(
        model, lambda: (step_loss(model, x, y) + step_loss(model, other, y)).backward(), repeated_calls="new"
    )
    right(
        both, 4 * (expected(model, x, y) + expected(model, other, y)) / 2
    )  # each loss is twice its share of 2 N samples


def step_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return numbers(model(x), y)


@remedy("a backward pass under vmap")
def _vmapped() -> None:
    model, x, y = problem()

    def jacobian() -> None:
        losses = (model(x) - y).square().sum(1)
        torch.autograd.grad(losses, list(model.parameters()), torch.eye(5).double(), is_grads_batched=True)

    with refused("outside of the monitor's block"):
        monitored(model, jacobian)
    right(monitored(model, lambda: step(model, x, y)), expected(model, x, y))
    jacobian()


@remedy("the backward pass goes through the graph of a gradient")
def _penalized_gradient() -> None:
    model, x, y = problem()

    def penalty() -> Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(model(z).sum(), z, create_graph=True)[0].square().sum()

    with refused("outside of the monitor's block"):
        monitored(model, lambda: penalty().backward())
    monitor = monitored(model, lambda: step(model, x, y))
    penalty().backward()
    right(monitor, expected(model, x, y))


@remedy("passed over, and one that it did not")
def _every() -> None:
    model, x, y = problem()
    with FisherMonitor(model, every=2), refused("enter and leave the monitor's block"):
        (numbers(model(x), y) + numbers(model(x), y)).backward()
    monitor = FisherMonitor(model)
    for watched in (True, False):
        if watched:
            with monitor:
                step(model, x, y)
        else:
            step(model, x, y)
    right(monitor, expected(model, x, y))


@remedy("its input was changed in place after the layer saw it; change it out of place")
def _in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.scale(x)
        if m.in_place:
            x.mul_(2)
        return m.last(h)

    model = Forward(forward, scale=nn.Linear(4, 4), last=nn.Linear(4, 3)).double()
    model.scale.weight.requires_grad_(False)
    model.in_place, x, y = True, torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with refused("change it out of place"):
        monitored(model, lambda: step(model, x.clone(), y), parameters="all")
    model.in_place = False
    model.scale.weight.requires_grad_(True)
    assert_exact(model, x, y)


# Checkpoints


@remedy("re-entrant activation checkpointing computes gradients only together")
def _reentrant() -> None:
    def make(use_reentrant: bool) -> nn.Module:
        return Forward(
            lambda m, x: m.last(
                CheckpointFunction.apply(m.first, True, x)
                if use_reentrant
                else checkpoint(m.first, x, use_reentrant=False)
            ),
            first=linear(4, 4),
            last=nn.Linear(4, 3),
        ).double()

    model, x, y = make(True), torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 3).double()
    plain = nn.Sequential(model.first, model.last)
    with refused("use_reentrant=False"):
        empirical_fisher_trace(model, numbers, x, y)
    right(monitored(model, lambda: step(model, x, y)), expected(plain, x, y))
    assert_exact(make(False), x.detach(), y)


@remedy("to hold a choice or weights of samples fixed")
def _choice() -> None:
    model, x, y = problem()

    def chosen(losses: Tensor) -> Tensor:
        return (losses > losses.mean()).to(losses)

    def hard(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = (outputs - targets).square().sum(1)
        return (losses * chosen(losses.detach())).mean()

    def weighted(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return ((outputs - targets[0]).square().sum(1) * targets[1]).mean()

    with refused("to hold a choice or weights of samples fixed"):
        empirical_fisher_trace(model, hard, x, y)
    with torch.no_grad():
        weights = chosen((model(x) - y).square().sum(1))
    truth = 0.0
    for n in range(len(x)):
        gradients = torch.autograd.grad(
            weighted(model(x[n : n + 1]), (y[n : n + 1], weights[n : n + 1])), list(model.parameters())
        )
        truth += sum(float(g.square().sum()) for g in gradients) / len(x)
    assert float(empirical_fisher_trace(model, weighted, x, (y, weights))) == pytest.approx(truth, rel=1e-8)
    right(monitored(model, lambda: hard(model(x), y).backward()), truth)


@remedy("if it has another number of samples, say which argument")
def _one_sequence_beside_its_state() -> None:
    """Two layers' states of one sequence look like two samples beside something that they share."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(3, 4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            y, state = self.rnn(x, state)
            return self.out(y), state

    torch.manual_seed(0)
    model = Recurrent().double()
    x, state, y = torch.randn(3, 6, 3).double(), torch.zeros(2, 3, 4).double(), torch.randint(3, (3, 6))

    def losses(first: int, end: int) -> Tensor:
        outputs, _ = model(x[first:end], state[:, first:end].contiguous())
        return F.cross_entropy(outputs.mT, y[first:end])

    def truth(n: int) -> float:
        gradients = (torch.autograd.grad(losses(k, k + 1), list(model.parameters())) for k in range(n))
        return sum(float(g.square().sum()) for one in gradients for g in one) / n

    with refused("the model's 2 samples (axis 0 of input 1, shape (2, 1, 4))"):
        monitored(model, lambda: losses(0, 1).backward())
    said: Any = {"inputs": {0: 0}}
    right(monitored(model, lambda: losses(0, 1).backward(), batch_axis=said), truth(1))
    right(monitored(model, lambda: losses(0, 3).backward()), truth(3))
