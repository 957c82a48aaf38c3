"""What a monitor costs on an accelerator, beside other packages: times, memory, launches and waits of the host.

``PYTHONPATH=tests python -m benchmarks.accelerator [names] [--device D] [--save]`` prints a table. On the pretend device times
mean nothing, and the run is a test of this program.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pretend
from benchmarks import launches, results
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS, Setting

STEPS = 12
WAYS = ("plain", "monitor_loop", "batch_l2", "ghost", "loop")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")


def billion() -> Setting:
    """A Llama-like model of about one billion parameters in bfloat16, with sequences of 2,048."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    model = launches.workloads.Logits(launches.hugging("LlamaForCausalLM", vocab_size=32000, **sizes, **heads))
    ids = torch.randint(32000, (2, 4, 2048))
    return Setting(model.train().bfloat16(), ids[0], ids[1], launches.of_words)


BUILDERS: dict[str, Callable[[], Setting]] = {name: one.setting for name, one in WORKLOADS.items()} | {
    "llama-1b": billion
}


def measured(build: Callable[[], Setting], way: str, device: torch.device) -> dict[str, Any]:
    """One way on one model: the median time of a steady step, and what it takes."""
    setting = build()
    move: Callable[[Any], Any] = pretend.moved if device.type == "pretend" else lambda value: value.to(device)
    model, inputs, targets = move(setting.model), move(setting.inputs), move(setting.targets)
    step = VARIANTS[way].prepare(model, setting.loss_fn)
    times = [_timed(step, model, device, inputs, targets) for _ in range(STEPS)]
    counts = _counted_on_pretend if device.type == "pretend" else _counted_by_profiler
    return {
        "milliseconds": 1e3 * statistics.median(times[STEPS // 2 :]),
        **counts(step, model, device, inputs, targets),
    }


def _timed(step: Callable[..., Any], model: nn.Module, device: torch.device, *batch: torch.Tensor) -> float:
    model.zero_grad()
    module = torch.get_device_module(device)
    module.synchronize()
    start = time.perf_counter()
    step(*batch)
    module.synchronize()
    return time.perf_counter() - start


def _counted_on_pretend(
    step: Callable[..., Any], model: nn.Module, device: torch.device, *batch: torch.Tensor
) -> dict[str, Any]:
    model.zero_grad()
    with pretend.counting() as counts:
        step(*batch)
    return {"launches": counts.launches.total(), "waits": counts.waits.total(), "peak": counts.peak}


def _counted_by_profiler(
    step: Callable[..., Any], model: nn.Module, device: torch.device, *batch: torch.Tensor
) -> dict[str, Any]:
    model.zero_grad()
    torch.accelerator.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(*batch)
    calls = {event.key: event.count for event in seen.key_averages()}
    launched = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    waited = sum(calls.get(name, 0) for name in WAITS)
    return {"launches": launched, "waits": waited, "peak": torch.cuda.max_memory_allocated(device) - before}


def card(device: torch.device) -> str:
    """What was measured on."""
    return "pretend" if device.type == "pretend" else torch.cuda.get_device_name(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BUILDERS], default=[], help="models; all of them by default")
    parser.add_argument(
        "--device", type=torch.device, default=None, help="by default CUDA's, or else the pretend device"
    )
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--save", action="store_true", help="keep the numbers in results/accelerator.json")
    options = parser.parse_args(arguments)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "pretend")
    if device.type == "pretend":
        pretend.register()
    print(
        f"{card(device)}\n{'model':10} | {'way':14} | {'ms':>9} | {'ratio':>6} | {'launches':>8} | {'waits':>5} | peak, MiB"
    )
    for name in options.names or BUILDERS:
        plain: float | None = None
        for way in options.ways:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row = measured(BUILDERS[name], way, device)
            except Exception as error:  # other packages can't do everything, and memory may run out
                print(f"{name:10} | {way:14} | {type(error).__name__}: {str(error)[:70]}", flush=True)
                continue
            plain = plain or row["milliseconds"]
            print(
                f"{name:10} | {way:14} | {row['milliseconds']:9.2f} | {row['milliseconds'] / plain:6.2f} | "
                f"{row['launches']:>8} | {row['waits']:>5} | {row['peak'] / 2**20:.1f}",
                flush=True,
            )
            if options.save:
                results.save("accelerator", {f"{card(device)}: {name}": {way: row}})


if __name__ == "__main__":
    main()
