"""What a monitor adds to a step on an accelerator, a pretend one or a real one: launches, waits of the host and bytes.

``PYTHONPATH=tests python -m benchmarks.launches [names] [--device cuda] [--save] [--places]`` prints a table. The step is the
tenth in one block: forward, loss and backward, when everything that a monitor looks for was found. ``--places`` lists the lines
that made the host wait, and ``--save`` keeps the numbers, both for the pretend device only.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results, workloads
from benchmarks.launched import Counted, counted, device_named, moved
from benchmarks.workloads import CLASSES, Classifier, Setting, classification, images, of_words, used
from torch_secorder import FisherMonitor

STEPS = 10
LANGUAGE = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Images(nn.Module):
    """A transformers model, from images to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


class Translator(nn.Module):
    """An encoder and a decoder, on the same word ids."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits


def hugging(name: str, **options: Any) -> nn.Module:
    """The transformers model of that class, with a configuration of its own kind."""
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def mobilenet() -> Setting:
    model = hugging("MobileNetV2ForImageClassification", image_size=64, num_labels=CLASSES)
    return images(used(Images(model)), 8, 64)


def swin() -> Setting:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "window_size": 4}
    shape = {"depths": [2, 2, 6], "num_heads": [2, 4, 8], "num_labels": CLASSES, "drop_path_rate": 0.0}
    return images(Images(hugging("SwinForImageClassification", **sizes, **shape)).train(), 8, 32)


def llama(n: int = 4, positions: int = 64) -> Setting:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    model = workloads.Logits(hugging("LlamaForCausalLM", **LANGUAGE, **sizes, **heads)).train()
    return _of_language(model, n, positions)


def t5(n: int = 4, positions: int = 32) -> Setting:
    sizes = {"d_model": 128, "d_kv": 16, "d_ff": 256, "num_layers": 3, "num_heads": 8, "dropout_rate": 0.0}
    model = hugging("T5ForConditionalGeneration", vocab_size=1000, decoder_start_token_id=0, **sizes)
    return _of_language(Translator(model).train(), n, positions)


def bert(n: int = 4, positions: int = 64) -> Setting:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hugging("BertForSequenceClassification", vocab_size=1000, num_labels=CLASSES, **sizes, **dropout)
    return classification(Classifier(model).train(), torch.randint(1000, (n, positions)))


def _of_language(model: nn.Module, n: int, positions: int) -> Setting:
    ids = [torch.randint(3, 1000, (n, positions)) for _ in range(2)]
    return Setting(model, ids[0], ids[1], of_words)


MODELS: dict[str, tuple[str, Callable[[], Setting]]] = {
    "mlp": ("MLP", workloads.mlp),
    "resnet": ("ResNet-18", workloads.resnet),
    "mobilenet": ("MobileNet-v2", mobilenet),
    "swin": ("Swin", swin),
    "gpt2": ("GPT-2, tied", partial(workloads.gpt2, n=4, positions=64, width=128, words=1000)),
    "bert": ("BERT", bert),
    "llama": ("Llama, grouped queries", llama),
    "t5": ("T5", t5),
}


@dataclass(frozen=True)
class Added:
    """What one step counts without and with a monitor.

    Attributes:
        tensors: the number of parameters that are analyzed.
    """

    plain: Counted
    monitored: Counted
    tensors: int

    def row(self) -> dict[str, Any]:
        """The numbers of the table."""
        return {
            "plain": self.plain.launches,
            "monitored": self.monitored.launches,
            "waits": self.monitored.waits - self.plain.waits,
            "per_tensor": (self.monitored.launches - self.plain.launches) / self.tensors,
            "peak": [self.plain.peak, self.monitored.peak],
        }


def added(build: Callable[[], Setting], steps: int = STEPS, device: str = "pretend", **options: Any) -> Added:
    """What the last of so many steps in the block of a monitor with these options adds to a plain one."""
    where = device_named(device)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        setting = moved(build(), where)
        model = setting.model

        def step() -> None:
            setting.loss_fn(model(setting.inputs), setting.targets).backward()

        # Plain steps are all alike; a GPU chooses its kernels in the first.
        plain = _last_step(model, step, 1 if device == "pretend" else 3, where, nullcontext())
        monitored = _last_step(model, step, steps, where, FisherMonitor(model, **options))
    return Added(plain, monitored, sum(p.requires_grad for p in model.parameters()))


def _last_step(
    model: nn.Module,
    step: Callable[[], None],
    steps: int,
    device: torch.device,
    block: AbstractContextManager[Any],
) -> Counted:
    with block:
        for _ in range(steps - 1):
            step()
            model.zero_grad()
        return counted(step, device)


HEAD = f"{'model':24} | {'launches':>14} | {'waits':>5} | {'added per tensor':>16} | {'peak, MiB':>16}"


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    peak = " -> ".join(f"{size / 2**20:.1f}" for size in row["peak"])
    launches = f"{row['plain']} -> {row['monitored']}"
    return f"{MODELS[name][0]:24} | {launches:>14} | {row['waits']:>5} | {row['per_tensor']:>16.1f} | {peak:>16}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], default=[], help="models; all of them by default")
    parser.add_argument("--device", default="pretend", help="the pretend one by default")
    parser.add_argument("--save", action="store_true", help="keep the numbers in results/launches.json")
    parser.add_argument("--places", action="store_true", help="list the lines of the library that made the host wait")
    options = parser.parse_args(arguments)
    print(HEAD)
    for name in options.names or MODELS:
        found = added(MODELS[name][1], device=options.device)
        print(line(name, found.row()), flush=True)
        if options.places:
            print(*(f"    {count:>4} {place}" for place, count in found.monitored.places.most_common()), sep="\n")
        if options.save:
            results.save("launches", {name: found.row()})


if __name__ == "__main__":
    main()
