"""The jobs of the how-to pages: what each page's code finds, beside a loop over single samples, with its time.

A page's code is run as it stands on the page. ``python -m benchmarks.jobs`` writes docs/how_to/jobs.rst.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.prune import is_pruned, remove

PAGES = Path(__file__).parents[2] / "docs" / "how_to"
Namespace = dict[str, Any]
BLOCK = re.compile(
    r"^\.\. (testsetup|testcode)::\n\n((?:   .*\n|\n)+)"
    r"|^\.\. literalinclude:: (\S+)\n   :start-after: (.+)\n   :end-before: (.+)\n",
    flags=re.MULTILINE,
)
SINGLE, BFLOAT16 = 1e-4, 3e-2  # 24 bits in sums of a few thousand terms; 8 bits in every product


@dataclass(frozen=True)
class Job:
    """One page.

    Attributes:
        page: its name.
        what: the job, in words.
        number: what the number is that is compared.
        call: runs the library again on what the page has made, and returns the number as a vector.
        loop: the same number by a forward and a backward pass for each sample alone.
        rtol: how far both may differ, relative to the vector's length.
    """

    page: str
    what: str
    number: str
    call: Callable[[Namespace], Tensor]
    loop: Callable[[Namespace], Tensor]
    rtol: float = SINGLE

    def blocks(self) -> Iterator[tuple[str, str]]:
        """The page's code, block by block, each with its kind."""
        for kind, code, file, start, end in BLOCK.findall((PAGES / f"{self.page}.rst").read_text(encoding="utf-8")):
            if file:
                _, _, rest = (PAGES / file).read_text(encoding="utf-8").partition(f"{start}\n")
                yield "testcode", rest.partition(f"{end}\n")[0]
            else:
                yield kind, textwrap.dedent(code)

    def lines(self) -> int:
        """How many lines the user writes: without empty ones, and without the model and data that stand for their own."""
        return sum(
            bool(line.strip()) for kind, code in self.blocks() if kind == "testcode" for line in code.splitlines()
        )

    def run(self) -> Namespace:
        """What the page's code has made."""
        torch.manual_seed(0)
        names: Namespace = {"torch": torch, "nn": nn, "__name__": self.page}
        for number, (_, code) in enumerate(self.blocks()):
            exec(compile(code, f"{self.page}.rst, block {number}", "exec"), names)
        return names


def gradients(model: nn.Module, loss: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
    """The gradient of a loss in each parameter."""
    parameters = {
        name: p for name, p in model.named_parameters() if (p.requires_grad if names is None else name in names)
    }
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def trace(model: nn.Module, losses: list[Callable[[], Tensor]]) -> Tensor:
    """The mean over samples of the squared gradient of each one's loss, summed over all parameters in float64."""
    return torch.stack(
        [sum(g.double().square().sum() for g in gradients(model, loss()).values()) for loss in losses]  # type: ignore[misc]
    ).mean()


def diagonal(model: nn.Module, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """The Fisher diagonal of a classifier: with labels the empirical one, without them the exact one of its own labels."""
    found = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for n in range(len(x)):
        probabilities = model(x[n : n + 1]).softmax(1)[0].detach()
        labels = dict(enumerate(probabilities)) if y is None else {int(y[n]): 1.0}
        for label, probability in labels.items():
            loss = cross_entropy(model(x[n : n + 1]), torch.tensor([label]))
            for name, g in gradients(model, loss).items():
                found[name] += probability * g.double().square() / len(x)
    return found


def flat(tensors: Any) -> Tensor:
    """One vector of all of them."""
    return torch.cat([x.detach().double().flatten() for x in tensors])


def row(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """One sample of a batch."""
    return {name: x[n : n + 1] for name, x in batch.items()}


def own_losses(model: nn.Module, batch: dict[str, Tensor], *, summed: bool) -> list[Callable[[], Tensor]]:
    """What each sequence adds to the loss, times their number; or the sum over its labels."""
    counts = [int((row(batch, n)["labels"][:, 1:] != -100).sum()) for n in range(len(batch["labels"]))]
    factor = 1 if summed else len(counts) / sum(counts)
    return [lambda n=n, k=k: model(**row(batch, n)).loss * k * factor for n, k in enumerate(counts)]  # type: ignore[misc]


def language_model(names: Namespace) -> Tensor:
    """The totals of both reports."""
    model, batch, report = names["model"], names["batch"], names["fisher_report"]
    own = report(model, "model", batch, progress=False)
    kind = {"labels": "labels", "reduction": "mean", "progress": False}
    sums = report(model, names["causal_lm"]("sum"), batch, **kind)
    return torch.tensor([own["fisher_trace"].sum(), sums["fisher_trace"].sum()])


def language_model_loop(names: Namespace) -> Tensor:
    """The same, in bfloat16 too."""
    model, batch = names["model"], names["batch"]
    return torch.stack([trace(model, own_losses(model, batch, summed=summed)) for summed in (False, True)])


def trainer(names: Namespace) -> Tensor:
    """Train on, and keep the weights and the batch of the third step, which is watched."""
    model, batches, seen = names["model"], [], {}

    class Keeping(names["Trainer"]):  # type: ignore[misc]
        def training_step(self, model: nn.Module, inputs: Any, *others: Any, **more: Any) -> Tensor:
            batches.append(dict(inputs))
            seen[len(batches)] = {name: p.detach().clone() for name, p in model.named_parameters()}
            return super().training_step(model, inputs, *others, **more)

    callback = names["FisherCallback"](every=2, by="module")
    Keeping(model, names["arguments"], train_dataset=names["data"], callbacks=[callback]).train()
    names["watched"] = seen[3], batches[2]
    return torch.tensor([callback.report["fisher_trace"].sum()])


def trainer_loop(names: Namespace) -> Tensor:
    """The third step's batch with its weights, sequence by sequence."""
    model, (weights, batch) = names["model"], names["watched"]
    model.load_state_dict(weights, strict=False)
    return trace(model, own_losses(model, batch, summed=False))[None]


def adapters(names: Namespace) -> Tensor:
    """The total of the frozen model, as on the page and behind adapters that are off, and that of the adapters."""
    adapted = names["adapted"]

    def is_base(name: str, parameter: Tensor) -> bool:
        return "lora" not in name

    with adapted.disable_adapter():
        again = names["fisher_report"](adapted, "model", names["batch"], parameters=is_base, progress=False)
    with names["FisherMonitor"](adapted) as monitor:
        adapted(**names["batch"]).loss.backward()
    return torch.tensor([names["frozen"]["fisher_trace"].sum(), again["fisher_trace"].sum(), float(monitor.trace)])


def adapters_loop(names: Namespace) -> Tensor:
    """The same, with gradients of all weights for the frozen model, whose adapters are off."""
    adapted, batch = names["adapted"], names["batch"]
    of_adapters = trace(adapted, own_losses(adapted, batch, summed=False))
    trained = {name: p.requires_grad for name, p in adapted.named_parameters()}
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora" not in name)
    with adapted.disable_adapter():
        of_frozen = trace(adapted, own_losses(adapted, batch, summed=False))
    for name, p in adapted.named_parameters():
        p.requires_grad_(trained[name])
    return torch.stack([of_frozen, of_frozen, of_adapters])


def merging(names: Namespace) -> Tensor:
    """The diagonals of both models, which decide the average."""
    results = (
        names["fisher_results"](model, None, (x, None), **names["kind"]).diagonal
        for model, x in zip(names["models"], names["data"], strict=True)
    )
    return flat(d for found in results for d in found.values())


def merging_loop(names: Namespace) -> Tensor:
    """The same, class by class."""
    pairs = zip(names["models"], names["data"], strict=True)
    return flat(d for model, x in pairs for d in diagonal(model, x, None).values())


def task_vectors_loop(names: Namespace) -> Tensor:
    """The averages over each filter's weights."""
    found = (diagonal(names["probe"], x, None) for x in names["tasks"].values())
    return flat(d.mean((1, 2, 3)) for task in found for d in task.values() if d.dim() == 4)


def unlearning(names: Namespace) -> Tensor:
    """The diagonals of all data and of what is forgotten."""
    data = (names["inputs"], names["targets"]), names["forget"]
    found = (names["fisher_results"](names["model"], names["loss_fn"], pair, **names["kept"]).diagonal for pair in data)
    return flat(d for one in found for d in one.values())


def unlearning_loop(names: Namespace) -> Tensor:
    """The same, sample by sample."""
    data = (names["inputs"], names["targets"]), names["forget"]
    return flat(d for x, y in data for d in diagonal(names["model"], x, y).values())


def sparse(names: Namespace) -> Tensor:
    """The mask, of ones and zeros."""
    for name, p in names["model"].named_parameters():
        p.data.copy_(names["before"][name])
    data = names["inputs"], names["targets"]
    results = names["fisher_results"](names["model"], names["loss_fn"], data, diagonal=True, progress=False)
    return flat(names["top_k_mask"](results.diagonal, share=0.1, always="4.*").values())


def sparse_loop(names: Namespace) -> Tensor:
    """The largest tenth by sorting all, and the head."""
    found = diagonal(names["model"], names["inputs"], names["targets"])
    body = flat(d for name, d in found.items() if not name.startswith("4."))
    head = flat(d for name, d in found.items() if name.startswith("4."))
    mask = torch.zeros_like(body)
    mask[body.argsort(descending=True)[: round(0.1 * len(body))]] = 1
    return torch.cat([mask, torch.ones_like(head)])


def bits(names: Namespace) -> Tensor:
    """The sums over rows that the table is made of, with all labels in place of four draws."""
    kind = {"fisher": "exact", "class_axis": -1, "shift": True, "diagonal": {"*_proj.weight": "rows"}}
    results = names["fisher_results"](names["model"], None, names["batch"], progress=False, **kind)
    return flat(results.diagonal.values())


def bits_loop(names: Namespace) -> Tensor:
    """The same, for each sequence, position and token that might come next."""
    model, batch = names["model"], names["batch"]
    wanted = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    found = {name: torch.zeros(len(p), dtype=torch.float64) for name, p in wanted.items()}
    n = len(batch["input_ids"])
    for sample in range(n):
        logarithms = model(**row(batch, sample)).logits[0, :-1].log_softmax(-1)
        for entry in logarithms.flatten():
            rows = torch.autograd.grad(entry, list(wanted.values()), retain_graph=True)
            for name, g in zip(wanted, rows, strict=True):
                found[name] += float(entry.detach().exp()) * g.double().square().sum(1) / n
    return flat(found.values())


def protecting(names: Namespace) -> Tensor:
    """The springs' diagonal, with labels that are drawn from a seed."""
    torch.manual_seed(1)
    return flat(names["fisher_diagonal"](names["model"], names["images"]).values())


def protecting_loop(names: Namespace) -> Tensor:
    """The same, with the same labels."""
    torch.manual_seed(1)
    model, images = names["model"], names["images"]
    with torch.no_grad():
        labels = [torch.distributions.Categorical(logits=model(batch)).sample() for batch in images.split(100)]
    return flat(diagonal(model, images, torch.cat(labels)).values())


def ranking(names: Namespace) -> Tensor:
    """Every example's norm, in the order of their numbers."""
    results = names["fisher_results"](names["model"], names["loss_fn"], names["loader"], **names["options"])
    return torch.tensor((results.per_sample.sum(axis=1) ** 0.5).sort_index().to_numpy())


def ranking_loop(names: Namespace) -> Tensor:
    """The same, an example at a time."""
    model, examples = names["model"], zip(names["inputs"], names["targets"], strict=True)
    return torch.stack(
        [flat(gradients(model, cross_entropy(model(x[None]), y[None])).values()).norm() for x, y in examples]
    )


def laplace(names: Namespace) -> Tensor:
    """The precision of every weight."""
    results = names["fisher_results"](names["model"], None, (names["inputs"], None), **names["options"])
    return flat(results.n_samples * d + 1.0 for d in results.diagonal.values())


def head_worths(names: Namespace) -> Tensor:
    """The Fisher of the mask on heads, with none of them pruned."""
    model = names["model"]
    if is_pruned(model):
        model.o_proj.weight_mask.fill_(1)
        remove(model.o_proj, "weight")
    with names["Gates"](model, names["heads"], fisher="sampled") as gates:
        names["loss_fn"](model(names["inputs"]), names["labels"]).backward()
    return gates.fisher["o_proj"]


def head_worths_loop(names: Namespace) -> Tensor:
    """The same, with a real mask that multiplies the heads of one sample at a time."""
    model, found = names["model"], torch.zeros(4, dtype=torch.float64)
    for x, y in zip(names["inputs"], names["labels"], strict=True):
        model.mask = torch.ones(4, requires_grad=True)
        (g,) = torch.autograd.grad(cross_entropy(model(x[None]), y[None]), model.mask)
        found += g.double().square() / len(names["inputs"])
    model.mask = None
    return found


def low_rank(names: Namespace) -> Tensor:
    """What each row counts."""
    results = names["fisher_results"](names["model"], None, (names["inputs"], None), **names["options"])
    return results.diagonal["2.weight"]


def noise(names: Namespace) -> Tensor:
    """The gradient's squared norm and the trace of its noise."""
    with names["FisherMonitor"](names["model"]) as monitor:
        for x, y in names["loader"]:
            names["loss_fn"](names["model"](x), y).backward()
    table = names["gradient_noise_scale"](monitor.report(), by="model")
    return torch.tensor(table[["true_grad_sq_norm", "noise_trace"]].to_numpy()[0])


def noise_loop(names: Namespace) -> Tensor:
    """The same from the products of different samples' gradients, and from their variances, batch by batch."""
    model, found = names["model"], []
    for x, y in names["loader"]:
        losses = (cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x)))
        each = torch.stack([flat(gradients(model, loss).values()) for loss in losses])
        products = each @ each.T
        pairs = (products.sum() - products.trace()) / (len(x) * (len(x) - 1))
        found.append(torch.stack([pairs, each.var(0).sum()]))
    return torch.stack(found).mean(0)


JOBS = (
    Job("continual_learning", "protect an earlier task", "Fisher diagonal", protecting, protecting_loop),
    Job("hugging_face", "Fisher of a padded language model", "trace", language_model, language_model_loop, BFLOAT16),
    Job("trainer", "watch a Trainer", "trace of a step", trainer, trainer_loop),
    Job("adapters", "ranks for PEFT", "traces, frozen and adapters", adapters, adapters_loop),
    Job("merge", "merge models", "Fisher diagonals", merging, merging_loop),
    Job(
        *("task2vec", "embed tasks", "task vectors"),
        lambda names: flat(names["task_vector"](names["probe"], x) for x in names["tasks"].values()),
        task_vectors_loop,
    ),
    Job("unlearn", "forget data", "Fisher diagonals", unlearning, unlearning_loop),
    Job("sparse_fine_tuning", "train a few weights", "mask", sparse, sparse_loop),
    Job("hard_examples", "rank examples", "norm of each", ranking, ranking_loop),
    Job(
        *("laplace", "tell how sure a prediction is", "precisions", laplace),
        lambda names: 64 * flat(diagonal(names["model"], names["inputs"], None).values()) + 1.0,
    ),
    Job("noise_scale", "choose a batch size", "signal and noise", noise, noise_loop),
    Job("prune_heads", "prune heads", "Fisher of a mask", head_worths, head_worths_loop),
    Job(
        *("low_rank", "factor weights into low rank", "sums over rows", low_rank),
        lambda names: diagonal(names["model"], names["inputs"], None)["2.weight"].sum(1),
    ),
    Job("transformer_bits", "bits for a transformer", "sums over rows", bits, bits_loop),
)


def timed(function: Callable[[Namespace], Tensor], names: Namespace) -> tuple[Tensor, float]:
    """What a function finds, and how many seconds of the processor the fastest of three runs takes."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = function(names)
        seconds.append(time.process_time() - start)
    return found, min(seconds)


def compared(job: Job) -> dict[str, Any]:
    """A row of the table."""
    names = job.run()
    found, seconds = timed(job.call, names)
    expected, of_loop = timed(job.loop, names)
    size = float(expected.norm())
    return {
        "job, and its number": f":doc:`{job.what} <{job.page}>`: {job.number}",
        "lines": job.lines(),
        "found": f"{float(found.norm()):.5g}",
        "loop": f"{size:.5g}",
        "differ": f"{float((found - expected).norm()) / size:.0e}",
        "ms": f"{1e3 * seconds:,.0f}",
        "loop, ms": f"{1e3 * of_loop:,.0f}",
    }


HEAD = """\
Jobs, and what they take
========================

Each page has a job's whole code, with a tiny model that is made on the spot. Lines are those that a user writes,
without the model and the data of the page where these only stand for one's own. The number that the job rests on is
found by the library, and by a loop with a forward and a backward pass for each sample alone (each label of each
sample, where labels are the model's); where it is a vector, its length is shown, and the length of the difference.
Times are of the analysis alone (for the Trainer, of training four steps), of one thread on the processor, the fastest
of three. With a few thousand parameters and samples by the dozen, calls of Python are most of them;
:doc:`../concepts/performance` has larger models. ``PYTHONPATH=tests python -m benchmarks.jobs`` writes this page, and
``tests/test_jobs.py`` compares the numbers.

"""


def main() -> None:
    """Write docs/how_to/jobs.rst."""
    torch.set_num_threads(1)
    rows = [compared(job) for job in JOBS]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 34 8 13 13 11 10 11", ""]
    for cells in (list(rows[0]), *(list(map(str, one.values())) for one in rows)):
        lines += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(cells)]
    (PAGES / "jobs.rst").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
