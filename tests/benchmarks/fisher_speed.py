"""Time of the exact and of the sampled Fisher trace, over a plain step: `python -m benchmarks.fisher_speed`.

As in `benchmarks.speed`: one process and one thread, every run between two plain steps, rounds through all of the
variants, medians. Here, variants differ in what they estimate, so each comes with its distance from the exact trace.

The library checks one sample by plain autograd in the first three calls and then in the 5th, 9th, 17th, ...; five calls
come before the measurement.
"""

from __future__ import annotations

import argparse
import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.exactness import refused
from benchmarks.speed import Contender, report
from benchmarks.steps import Step
from benchmarks.variants import VARIANTS, Variant, table, total
from benchmarks.workloads import WORKLOADS, Loss, Workload
from torch_secorder import fisher_report, generalized_fisher_trace

BEFORE = 5  # calls


def function(num_samples: int | None) -> Callable[[nn.Module, Loss], Step]:
    """From a plain forward's outputs."""
    return lambda model, loss_fn: lambda x, y: generalized_fisher_trace(model, model(x), None, num_samples=num_samples)


def rows(**options: object) -> Callable[[nn.Module, Loss], Step]:
    """With the library's own forward, and a row for each parameter."""
    return lambda model, loss_fn: lambda x, y: fisher_report(model, None, (x, y), progress=False, **options)


def backpack(extension: str, attribute: str, **options: int) -> Callable[[nn.Module, Loss], Step]:
    def prepare(model: nn.Module, loss_fn: Loss) -> Step:
        import backpack as package
        from backpack import extensions

        model, loss_fn = package.extend(model), package.extend(copy.deepcopy(loss_fn))

        def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            with package.backpack(getattr(extensions, extension)(**options)):
                loss_fn(model(inputs), targets).backward()
            found = {name: getattr(p, attribute).sum() for name, p in model.named_parameters()}
            for p in model.parameters():
                delattr(p, attribute)
            return found

        return step

    return prepare


def named(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


FISHERS = (
    Variant("exact", "generalized_fisher_trace", function(None), total),
    Variant("exact_report", "fisher_report, exact", rows(fisher="exact"), table),
    Variant("diag_ggn", "BackPACK DiagGGNExact", backpack("DiagGGNExact", "diag_ggn_exact"), named),
    *(Variant(f"sampled_{k}", f"num_samples={k}", function(k), total, estimates=True) for k in (1, 4)),
    Variant("sampled_report", "fisher_report, num_samples=1", rows(fisher="sampled"), table, estimates=True),
    Variant(
        "diag_mc", "BackPACK DiagGGNMC, 1", backpack("DiagGGNMC", "diag_ggn_mc", mc_samples=1), named, estimates=True
    ),
)


def measured(workload: Workload, repeats: int) -> list[str]:
    setting = workload.setting()
    batch = setting.batch()
    exact = float(generalized_fisher_trace(setting.model, setting.model(batch[0]), None))
    plain = Contender(VARIANTS["plain"], setting.model, VARIANTS["plain"].prepare(setting.model, setting.loss_fn), "")
    ready, lines = [], []
    for variant in FISHERS:
        twin = copy.deepcopy(setting.model)

        def first(variant: Variant = variant, twin: nn.Module = twin) -> tuple[Step, float]:
            step = variant.prepare(twin, setting.loss_fn)
            value = sum(variant.read(step(*batch)).values())
            for _ in range(BEFORE - 1):
                step(*batch)
                twin.zero_grad(set_to_none=True)
            return step, value / exact - 1

        found, refusal = refused(first)
        if found is None:
            lines.append(f"  {variant.label:30} {refusal}")
        else:
            twin.zero_grad(set_to_none=True)
            ready.append(Contender(variant, twin, found[0], f"{found[1]:+.1e}"))
    gc.collect()
    gc.freeze()
    steps, before = [], min(plain.seconds(batch) for _ in range(3))
    for number in range(repeats):
        for other in ready:
            report(f"{workload.name}: round {number + 1} of {repeats}, {other.variant.label}")
            seconds, after = other.seconds(batch), plain.seconds(batch)
            other.ratios.append(2 * seconds / (before + after))
            steps.append(before := after)
    gc.unfreeze()
    report("")
    for other in ready:
        low, middle, high = torch.tensor(other.ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        lines.append(f"  {other.variant.label:30}{middle:6.2f}  [{low:.2f}, {high:.2f}]   off by {other.verdict}")
    return [f"{workload.label}: plain step {1000 * median(steps):.1f} ms, trace {exact:.5g}", *lines]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fisher_speed", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mlp", "cnn"])
    parser.add_argument("--repeats", type=int, default=9, help="rounds (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.workloads:
        print(*measured(WORKLOADS[name], options.repeats), sep="\n", flush=True)


if __name__ == "__main__":
    main()
