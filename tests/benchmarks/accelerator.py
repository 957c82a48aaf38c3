"""What a monitor costs on an accelerator, beside other packages: times, memory, launches and waits of the host.

``PYTHONPATH=tests python -m benchmarks.accelerator [names] [--device D] [--save]`` prints a table. On the pretend device times
mean nothing, and the run is a test of this program.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import launches, results, workloads
from benchmarks.launched import counted, device_named, moved
from benchmarks.variants import VARIANTS
from benchmarks.workloads import CLASSES, WORKLOADS, Setting, images, used

STEPS = 12
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "_accelerator.rst"
HEAD = (
    *(".. list-table::", "   :header-rows: 1", "", "   * - model", "     - way", "     - first", "     - steady"),
    *("     - ratio", "     - launches", "     - waits", "     - peak, MiB"),
)
WAYS = ("plain", "monitor_loop", "batch_l2", "ghost", "loop")


def billion() -> Setting:
    """A Llama-like model of about one billion parameters in bfloat16, with sequences of 2,048."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    model = launches.workloads.Logits(launches.hugging("LlamaForCausalLM", vocab_size=32000, **sizes, **heads))
    ids = torch.randint(32000, (2, 4, 2048))
    return Setting(model.train().bfloat16(), ids[0], ids[1], launches.of_words)


def gpt2_small() -> Setting:
    """GPT-2 with 124 million parameters, on four times 1,024 words."""
    return workloads.gpt2(n=4, positions=1024, width=768, words=50257, layers=12)


def vit() -> Setting:
    """ViT-B/16 with 86 million parameters, on 32 images of 224 x 224."""
    return images(launches.Images(launches.hugging("ViTForImageClassification", num_labels=CLASSES)).train(), 32, 224)


def resnet50() -> Setting:
    """ResNet-50 with 24 million parameters in eval mode, on 32 images of 224 x 224."""
    return images(used(launches.Images(launches.hugging("ResNetForImageClassification", num_labels=CLASSES))), 32, 224)


BUILDERS: dict[str, Callable[[], Setting]] = {name: one.setting for name, one in WORKLOADS.items()} | {
    "resnet50": resnet50,
    "vit": vit,
    "gpt2-small": gpt2_small,
    "llama-1b": billion,
}


def built(name: str, device: torch.device) -> Setting:
    """The model and its batch on the device; a real one also draws the weights, which takes a CPU long."""
    if device.type == "pretend":
        return moved(BUILDERS[name](), device)
    with device:
        return BUILDERS[name]()


def measured(setting: Setting, way: str, device: torch.device) -> dict[str, Any]:
    """One way on one model: the time of its first step, the median time of a steady one, and what that takes."""
    model, batch = copy.deepcopy(setting.model), (setting.inputs, setting.targets)
    for _ in range(2):  # kernels are loaded and chosen
        _timed(VARIANTS["plain"].prepare(model, setting.loss_fn), model, device, *batch)
    step = VARIANTS[way].prepare(model, setting.loss_fn)
    times = [_timed(step, model, device, *batch) for _ in range(STEPS)]
    model.zero_grad()
    return {
        "first": 1e3 * times[0],
        "milliseconds": 1e3 * statistics.median(times[STEPS // 2 :]),
        **counted(partial(step, *batch), device).row(),
    }


def _timed(step: Callable[..., Any], model: nn.Module, device: torch.device, *batch: torch.Tensor) -> float:
    model.zero_grad()
    module = torch.get_device_module(device)
    module.synchronize()
    start = time.perf_counter()
    step(*batch)
    module.synchronize()
    return time.perf_counter() - start


def card(device: torch.device) -> str:
    """What was measured on."""
    return "pretend" if device.type == "pretend" else torch.cuda.get_device_name(device)


def page() -> str:
    """The tables of all cards, as a part of a page of the documentation."""
    found = results.saved("accelerator")
    cards = sorted({key.partition(": ")[0] for key in found["rows"]} - {"pretend"})
    lines = []
    for one in cards:
        lines += [f"{one}, torch {found['machine']['packages']['torch']}, milliseconds of one step:", "", *HEAD]
        for name in BUILDERS:
            lines += _rows(name, found["rows"].get(f"{one}: {name}", {}))
        lines.append("")
    return "\n".join(lines)


def _rows(name: str, ways: dict[str, dict[str, Any]]) -> Iterator[str]:
    for way in filter(ways.__contains__, WAYS):
        row, plain = ways[way], ways["plain"]
        cells = [
            f"``{name}``" if way == "plain" else "",
            VARIANTS[way].label,
            f"{row['first']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['milliseconds'] / plain['milliseconds']:.2f}",
            str(row["launches"]),
            str(row["waits"]),
            f"{row['peak'] / 2**20:,.0f}",
        ]
        yield from (f"   {'*' if index == 0 else ' '} - {cell}" for index, cell in enumerate(cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BUILDERS], default=[], help="models; all of them by default")
    parser.add_argument(
        "--device", type=device_named, default=None, help="by default CUDA's, or else the pretend device"
    )
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--save", action="store_true", help="keep the numbers in results/accelerator.json")
    options = parser.parse_args(arguments)
    device = options.device or device_named("cuda" if torch.cuda.is_available() else "pretend")
    names = ("model", 10), ("way", 14), ("first", -9), ("ms", -9), ("ratio", -6), ("launches", -8), ("waits", -5)
    heads = [f"{word:>{-size}}" if size < 0 else f"{word:{size}}" for word, size in names]
    print(card(device), " | ".join([*heads, "peak, MiB"]), sep="\n")
    for name in options.names or BUILDERS:
        plain: float | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setting = built(name, device)
        for way in options.ways:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row = measured(setting, way, device)
            except Exception as error:  # other packages can't do everything, and memory may run out
                print(f"{name:10} | {way:14} | {type(error).__name__}: {str(error)[:70]}", flush=True)
                continue
            plain = plain or row["milliseconds"]
            print(
                f"{name:10} | {way:14} | {row['first']:9.2f} | {row['milliseconds']:9.2f} | "
                f"{row['milliseconds'] / plain:6.2f} | {row['launches']:>8} | {row['waits']:>5} | {row['peak'] / 2**20:.1f}",
                flush=True,
            )
            if options.save:
                results.save("accelerator", {f"{card(device)}: {name}": {way: row}})
    if options.save:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
