"""Ranks for PEFT: within their budget, better than the same rank everywhere, and what PEFT makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_secorder import fisher_report
from torch_secorder.errors import ArgumentError
from torch_secorder.integrations.peft import rank_pattern
from torch_secorder.tables import table


def report_of(layers: dict[str, tuple[tuple[int, ...], float]], kind: str = "Linear") -> pd.DataFrame:
    rows = [
        {"parameter": f"{name}.weight", "module": name, "module_type": kind, "shape": shape, "fisher_trace": trace}
        for name, (shape, trace) in layers.items()
    ]
    return table(rows, "parameter")


@pytest.mark.parametrize("seed", range(5))
def test_equal_layers_get_the_best_ranks_of_all(seed: int) -> None:
    """Where every rank costs as much, giving it to the largest gain is the optimum: no other ranks are better."""
    generator = torch.Generator().manual_seed(seed)
    traces = torch.rand(3, generator=generator).tolist()
    found = rank_pattern(report_of({name: ((6, 6), t) for name, t in zip("abc", traces, strict=True)}), budget=4)
    assert sum(found.values()) <= 12
    left = sum(t / found[name] for name, t in zip("abc", traces, strict=True))
    others = (ranks for ranks in itertools.product(range(1, 7), repeat=3) if sum(ranks) <= 12)
    assert left == pytest.approx(min(sum(t / r for t, r in zip(traces, ranks, strict=True)) for ranks in others))


def test_ranks_keep_to_their_bounds() -> None:
    layers = {"small": ((2, 50), 100.0), "large": ((40, 60), 1.0), "nothing": ((30, 30), 0.0)}
    found = rank_pattern(report_of(layers), budget=8)
    assert found["small"] == 2
    assert found["nothing"] == 1
    sizes = {name: sum(shape) for name, (shape, _) in layers.items()}
    assert sum(found[name] * size for name, size in sizes.items()) <= 8 * sum(sizes.values())
    assert 8 * sum(sizes.values()) - sum(found[name] * size for name, size in sizes.items()) < 100
    assert rank_pattern(report_of(layers), 212, unit="parameters") == {"small": 1, "large": 1, "nothing": 1}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own, of transformers
def test_peft_takes_them() -> None:
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()
    ids = torch.randint(20, (6, 5))
    report = fisher_report(
        *(model, None, (ids, None)), fisher="sampled", class_axis=-1, parameters="all", progress=False
    )
    ranks = rank_pattern(report, budget=3, modules=lambda name: name.endswith("_proj"))
    assert len(ranks) == 14
    assert len(set(ranks.values())) > 1
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=list(ranks), rank_pattern=ranks))
    factors = {n: p for n, p in adapted.named_parameters() if "lora_A" in n}
    assert len(factors) == 14
    for name, p in factors.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        assert p.shape[0] == ranks[module]
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable <= 3 * sum(sum(report.loc[f"{name}.weight", "shape"]) for name in ranks)


def test_embeddings_get_none_unless_asked_for() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    report = fisher_report(model, None, (torch.randint(9, (5, 3)), None), fisher="exact", progress=False)
    assert list(rank_pattern(report, 2)) == ["2"]
    assert list(rank_pattern(report, 2, modules=lambda name: True)) == ["0", "2"]


@pytest.mark.parametrize(
    ("report", "options", "words"),
    [
        (report_of({"a": ((4, 4), 1.0)}), {"budget": 0}, "budget must be an int >= 1"),
        (report_of({"a": ((4, 4), 1.0)}), {"budget": 2, "unit": "bits"}, "unit must be one of"),
        (report_of({"a": ((4, 4), 1.0)}), {"budget": 7, "unit": "parameters"}, "must be at least 8 parameters"),
        (report_of({"a": ((4,), 1.0)}), {"budget": 2}, "gets an adapter"),
        (report_of({"a": ((4, 4), float("nan"))}), {"budget": 2}, "trace of a is no number"),
        (pd.DataFrame({"numel": [1]}), {"budget": 2}, "lacks module, module_type, shape, fisher_trace"),
    ],
)
def test_nonsense_is_refused_in_words(report: Any, options: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        rank_pattern(report, **options)
