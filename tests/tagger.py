"""A small model that takes its batches by name and computes its loss itself, and a float64 loop over its samples."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100


class Outputs(UserDict):  # type: ignore[type-arg]  # a mapping with attributes, as transformers' are
    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Tagger(nn.Module):
    """Classes for each position; the loss averages over labels or samples, or sums, or is none that takes samples apart."""

    def __init__(self, loss: str = "labels", vocabulary: int = 7, dropout: float = 0.0):
        super().__init__()
        self.embedding, self.last = nn.Embedding(vocabulary, 5), nn.Linear(5, vocabulary)
        self.dropout, self.loss = nn.Dropout(dropout), loss

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Outputs:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.last(self.dropout(torch.tanh(hidden + hidden.cumsum(1))))
        outputs = Outputs(logits=logits)
        return outputs if labels is None else Outputs(loss=self.of_labels(logits, labels), **outputs)

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        each = cross_entropy(logits.movedim(-1, 1), labels, reduction="none", ignore_index=IGNORED)
        counted = labels != IGNORED
        by_sample = each.sum(1) / counted.sum(1).clamp(min=1)
        if self.loss == "labels":
            return each.sum() / counted.sum()
        return {
            "samples": by_sample.mean(),
            "sum": each.sum(),
            "root": by_sample.mean().sqrt(),
            "contrast": (logits.mean((1, 2)).softmax(0) * by_sample).sum(),
            "square": each.sum() ** 2,
        }[self.loss]


def tagged(n: int = 4, t: int = 5) -> dict[str, Tensor]:
    """A batch with padding on the right, whose samples have t, t - 1, ... labels."""
    ids, lengths = torch.randint(7, (n, t)), t - torch.arange(n) % t
    mask = torch.arange(t) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids.flip(1), IGNORED)}


def squared_norms(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """||gradient||^2 of every parameter for each of these losses, by plain autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]
    return {
        name: torch.stack(
            [torch.zeros((), dtype=torch.float64) if g is None else g.double().square().sum() for g in column]
        )
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def shares(model: Tagger, batch: dict[str, Tensor]) -> list[Tensor]:
    """l_n: N times what sample n adds to the batch's loss under an average, what it adds under a sum."""
    labels, n = batch["labels"], len(batch["labels"])
    total = (labels != IGNORED).sum()
    found = []
    for i in range(n):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        logits = model(one["input_ids"], one["attention_mask"]).logits
        summed = cross_entropy(logits.movedim(-1, 1), one["labels"], reduction="sum", ignore_index=IGNORED)
        own = (one["labels"] != IGNORED).sum().clamp(min=1)
        found.append({"labels": n * summed / total, "samples": summed / own, "sum": summed}[model.loss])
    return found
