"""Tiny ones of published mixtures of experts: exact, and without a search in each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routers import LOOKED_AT, STEPS
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed

transformers = pytest.importorskip("transformers")

N, T = 3, 8
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
LATENT = {"n_routed_experts": 4, "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LINEAR = {"num_experts": 4, "shared_expert_intermediate_size": 8, "head_dim": 8, "linear_num_value_heads": 2}
LINEAR |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
# Writes into parts of queries and keys; the same; writes in chunks, padding and triangular systems; a function of its own.
MODELS = {
    "DeepseekV2ForCausalLM": LATENT | {"q_lora_rank": None},
    "DeepseekV3ForCausalLM": LATENT | {"q_lora_rank": 8},
    "Qwen3NextForCausalLM": LINEAR,
    "PhimoeForCausalLM": {"num_local_experts": 4},
}


def made(name: str) -> nn.Module:
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this release of transformers has no {name}")
    torch.manual_seed(0)
    return kind(kind.config_class(**SIZES | MODELS[name])).eval()


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_published_mixtures_are_searched_only_to_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(name), [torch.randint(1, 50, (N, T)) for _ in range(STEPS)]
    expected = by_a_loop(model, batches)
    looked, findings = list[int](), SearchPasses.findings

    def counted(self: SearchPasses, wanted: list[Viewed]) -> object:
        looked.append(step)
        return findings(self, wanted)

    monkeypatch.setattr(SearchPasses, "findings", counted)
    with FisherMonitor(model, per_sample=True) as monitor:
        for step, ids in enumerate(batches, start=1):  # noqa: B007  # what counts reads the step
            losses_of(model, ids).mean().backward()
    assert sorted(set(looked)) == LOOKED_AT
    found = torch.from_numpy(monitor.per_sample[[*dict(model.named_parameters())]].to_numpy(copy=True)).double()
    # Norms and rotations compute in float32, where a gradient that is a difference of large terms keeps three digits.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6 * float(expected.sum(1).max()))


def by_a_loop(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The squared norm of each sample's gradient of each parameter, from its loss alone."""
    weights, rows = list(model.parameters()), []
    for ids in batches:
        for loss in losses_of(model, ids):
            grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            rows.append([0.0 if g is None else float(g.double().square().sum()) for g in grads])
    return torch.tensor(rows, dtype=torch.float64)
