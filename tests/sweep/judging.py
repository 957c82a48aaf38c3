"""Compares the library's traces with a loop over samples alone, by plain autograd, in float64 where the model allows it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from models import at_full_width
from torch_secorder import FisherMonitor, fisher_report

from .inputs import SAMPLES, Inputs
from .making import Made, NotMadeError, first_line, floating, leaves

# Relative to a parameter's trace, and to the total. In float64 some layers cast to float32 in ways of their own, which
# leaves 1e-7 of a gradient, squared and relative to the total 1e-14, where it is zero by symmetry. In float32 a gradient
# that is a difference of large terms keeps three digits of its square.
TOLERANCES = {torch.float64: (1e-5, 1e-11), torch.float32: (3e-3, 1e-8)}
Traces = dict[str, float]


def loss_of(outputs: Any, paths: list[str]) -> Tensor:
    """The mean over each output's elements of its squared distance to a ramp, summed over samples.

    Without the ramp, outputs of a norm would have a constant sum of squares, whose gradient is zero.
    """
    found = dict(leaves(outputs))
    total = torch.zeros(())
    for path in paths:
        flat = found[path].flatten(1)
        total = total + (flat - torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).square().mean(1).sum()
    return total


def one(inputs: Inputs, n: int) -> Inputs:
    return {key: value[n : n + 1] for key, value in inputs.items()}


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


class Wide(nn.Module):
    """A model whose forward takes nothing in less than the sweep's dtype, and that keeps nothing of earlier forward passes.

    Casts are only replaced while the model runs, since the library's own have to stay what they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, **inputs: Tensor) -> Any:
        forget(self.model)
        with at_full_width(self.dtype):
            return self.model(**inputs)


def forget(model: nn.Module) -> None:
    """Empties the tables of attention biases that LeViT and others keep, with their graphs, in evaluation mode."""
    for module in model.modules():
        for name in CACHES:
            if isinstance(table := getattr(module, name, None), dict):
                table.clear()


CACHES = ("attention_bias_cache", "attention_biases_cache")


class Judge:
    """The oracle for one model and its inputs, and what the library says beside it."""

    def __init__(self, made: Made) -> None:
        self.dtype = torch.float64
        try:
            self._prepare(made)
        except NotMadeError:
            raise
        except Exception:
            torch.set_default_dtype(torch.float32)
            self.dtype = torch.float32
            self._prepare(made)

    def _prepare(self, made: Made) -> None:
        torch.set_default_dtype(self.dtype)
        self._kept: dict[int, dict[str, Tensor]] = {}
        forget(made.model)
        self.model = Wide(copy.deepcopy(made.model).to(self.dtype), self.dtype)
        self.inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in made.inputs.items()}
        together = floating(self.model(**self.inputs), SAMPLES)
        again = floating(self.model(**self.inputs), SAMPLES)
        if any(not close(again[k], together[k], self.dtype) for k in together):
            raise NotMadeError("draws random numbers in evaluation mode")
        self.named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.truth = dict.fromkeys(self.named, 0.0)
        self.reached: set[str] = set()
        self.paths = [path for path in together if all(self._alone(n, path, together) for n in range(SAMPLES))]
        self.beside = [path for path in together if path not in self.paths]
        self.coupled = not self.paths
        self.sums = {name: torch.zeros_like(p) for name, p in self.named.items()}
        for n in range(SAMPLES if self.paths else 0):
            self._sample(n)
        if self.paths:
            self._conservation()

    def _outputs(self, n: int) -> dict[str, Tensor]:
        """Those of sample n alone."""
        if n not in self._kept:
            try:
                self._kept[n] = floating(self.model(**one(self.inputs, n)), 1)
            except Exception as error:
                raise NotMadeError(f"a sample alone: {first_line(error)}") from error
        return self._kept[n]

    def _alone(self, n: int, path: str, together: dict[str, Tensor]) -> bool:
        """Whether this output of sample n alone is that which it has in its batch."""
        outputs = self._outputs(n)
        return path in outputs and close(outputs[path][0], together[path][n], self.dtype)

    def _sample(self, n: int) -> None:
        """The loop over samples: the squared gradient of sample n's loss is added to the truth."""
        loss = loss_of(self.model(**one(self.inputs, n)), self.paths)
        gradients = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
        for name, gradient in zip(self.named, gradients, strict=True):
            if gradient is not None:
                self.reached.add(name)
                self.truth[name] += float(gradient.detach().double().square().sum())
                self.sums[name] += gradient.detach()

    def _conservation(self) -> None:
        """Gradients of samples alone add up to that of the batch, or torch itself is wrong about one of them."""
        loss = loss_of(self.model(**self.inputs), self.paths)
        gradients = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
        scale = max(float(s.abs().max()) for s in self.sums.values() if s.numel())
        for (name, total), gradient in zip(self.sums.items(), gradients, strict=True):
            if gradient is not None and gradient.numel() and float((gradient - total).abs().max()) > 1e-4 * scale:
                raise NotMadeError(f"plain autograd's gradients of {name} alone don't add up to that of the batch")

    def off(self, found: Any) -> dict[str, str]:
        """The parameters whose trace is not that of the loop."""
        relative, absolute = TOLERANCES[self.dtype]
        total = sum(self.truth.values())
        return {
            name: f"{float(found[name]):.4g} for {value:.4g}"
            for name, value in self.truth.items()
            if not abs(float(found[name]) - value) <= relative * value + absolute * total
        }

    def monitor(self) -> str:
        def run() -> Any:
            with FisherMonitor(self.model, "sum") as watch:
                loss_of(self.model(**self.inputs), self.paths).backward()
            return watch.report()

        return self._said(run)

    def report(self) -> str:
        loss = lambda outputs, targets: loss_of(outputs, self.paths)  # noqa: E731
        return self._said(
            lambda: fisher_report(self.model, loss, [(self.inputs, None)], reduction="sum", progress=False)
        )

    def _said(self, run: Any) -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                table = run()
        except Exception as error:
            if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
                raise NotMadeError("needs more memory than a process of the sweep may take") from error
            own = type(error).__module__.startswith("torch_secorder")
            return f"{'refused' if own else 'crashed'} {first_line(error, 300)}"
        finally:
            self.model.zero_grad(set_to_none=True)
        self.rules = sorted({rule.partition(" (")[0] for rule in table.rule})
        if self.coupled:
            return "numbers, where there is nothing to be right about"
        wrong = self.off(table.fisher_trace)
        if not wrong:
            return "exact"
        shown = dict(list(wrong.items())[:6])
        return f"wrong in {len(wrong)} of {len(self.truth)}: {shown}"


def opened(model: nn.Module) -> nn.Module:
    """The model with noise on its parameters, so that gates and branches that begin at zero carry a gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


RANKS = ("wrong", "crashed", "refused", "exact")


def outcome(made: Made) -> dict[str, Any]:
    """A row of the results: what the monitor and the report said, of the model as it begins and with noise on it."""
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in made.model.parameters())}
    row["inputs"] = {k: list(v.shape) for k, v in made.inputs.items()}
    said: list[str] = []
    for state, model in (("", made.model), (" opened", opened(copy.deepcopy(made.model)))):
        torch.set_default_dtype(torch.float32)
        try:
            judge = Judge(Made(model, made.inputs))
        except NotMadeError:
            if not state:
                raise
            break  # noise has made the model draw samples or overflow
        row |= {
            "dtype": str(judge.dtype).removeprefix("torch."),
            "outputs": judge.paths[:8],
            "coupled": judge.beside[:8],
        }
        if judge.coupled:
            judge.paths = judge.beside
        elif not 0 < sum(judge.truth.values()) < float("inf"):
            raise NotMadeError(f"the loop over samples gives {sum(judge.truth.values())}")
        row["reached"] = f"{len(judge.reached)} of {len(judge.named)}"
        row[f"monitor{state}"] = judge.monitor()
        row[f"report{state}"] = judge.report()
        said += [row[f"monitor{state}"], row[f"report{state}"]]
        if judge.coupled:
            break
    coupled = not row["outputs"]
    row["outcome"] = "coupled" if coupled else next(r for r in RANKS if any(s.startswith(r) for s in said))
    return row
