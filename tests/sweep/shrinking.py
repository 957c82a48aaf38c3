"""Tiny configurations: what an attribute's name says about how far its value may be reduced.

Sizes are powers of two, so that heads divide widths and groups divide channels whichever of them were reduced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Changes = dict[str, Any]
WIDTH, HEADS, HEAD_WIDTH, INNER, VOCABULARY, POSITIONS, EXPERTS = 32, 4, 8, 64, 99, 64, 4


def at_most(limit: int) -> Callable[[Any], Any]:
    """Numbers are cut to `limit`; lists of unequal numbers keep their proportions."""

    def cut(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            top = max(value)
            scaled = [max(8, 2 ** round(math.log2(max(v, 1) * 2 * limit / top))) for v in value]
            return type(value)([limit] * len(value) if min(value) == top else scaled) if top > 2 * limit else value
        return min(value, limit)

    return cut


def each_at_most(limit: int) -> Callable[[Any], Any]:
    def cut(value: Any) -> Any:
        return type(value)(min(v, limit) for v in value) if isinstance(value, (list, tuple)) else min(value, limit)

    return cut


def heads(limit: int) -> Callable[[Any], Any]:
    """Powers of two, which divide the widths."""
    cut = lambda v: 2 ** int(math.log2(min(v, limit))) if v > 0 else v  # noqa: E731
    return lambda value: type(value)(map(cut, value)) if isinstance(value, (list, tuple)) else cut(value)


GROUPS: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {  # a rule applies where the whole name matches
    "layers": [
        (r"(.*_)?(num_)?(hidden_|transformer_|encoder_|decoder_)*(layers|layer|blocks|depth|depths)", each_at_most(2)),
        (
            r"n_layers?|num_(en|de)coder_layers|block_sizes|layers_block_type|num_block_repeats|layer_depths",
            each_at_most(2),
        ),
        (r"stage_num_blocks|stage_numb_of_layers|num_hidden_blocks|num_kv_shared_layers", each_at_most(1)),
        (r"(attn|expert)_layer_period", each_at_most(2)),
        (r"(attn|expert)_layer_offset", each_at_most(1)),
        (r"first_k_dense_replace|num_nextn_predict_layers|max_window_layers", each_at_most(1)),
    ],
    "vocabulary": [
        (r"(.*_)?(vocab_size|vocabulary_size)", at_most(VOCABULARY)),
        (r"vocab_size_per_layer_input", at_most(VOCABULARY)),
    ],
    "positions": [
        (
            r"(max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len|seq_length)",
            at_most(POSITIONS),
        ),
        (r"max_2d_position_embeddings|max_bucket_size", at_most(POSITIONS)),
    ],
    "experts": [
        (r"(num_|n_)?(local_|routed_)?experts|moe_num_experts|num_experts", each_at_most(EXPERTS)),
        (r"num_experts_per_(tok|token)|moe_(k|topk|top_k)|top_k|num_selected_experts|moe_topk", each_at_most(2)),
        (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts", each_at_most(1)),
    ],
    "widths": [
        (r"rotary_dim|upsample_groups", at_most(HEAD_WIDTH)),
        (
            r"(.*_)?(hidden_size|hidden_sizes|d_model|n_embd|embed_dim|embed_dims|hidden_dim|embedding_size|dim|dims|width|"
            r"projection_dim|word_embed_proj_dim|conv_dim|hidden_channels|lru_width|bottleneck_size|emb_dim|embedding_dim|"
            r"q_dim|d_latents|projection_size|pooler_output_size|embedding_dims|hidden_units|num_features|channels_list)",
            at_most(WIDTH),
        ),
        (
            r"(.*_)?(stem_channels|stage_in_channels|stage_mid_channels|stage_out_channels|encoder_in_channels)",
            at_most(WIDTH),
        ),
        (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_attention_heads_.*)", heads(HEADS)),
        (r"(.*_)?(num_)?(key_value|kv)_heads|n_head_kv|multi_query_group_num", heads(2)),
        (r"(.*_)?(head_dim|d_kv|d_head|attention_head_size|head_size|kv_channels|head_width)", at_most(HEAD_WIDTH)),
        (r"num_filters|.*group_vocab", at_most(4)),
        (r"(.*_)?num_groups", heads(2)),
        (r"linear_num_key_heads", each_at_most(2)),
        (r"linear_num_value_heads", each_at_most(4)),
        (r"(q|kv|o)_lora_rank|.*_low_rank_dim", at_most(16)),
        (r"(mamba_)?(d_state|state_size|time_step_rank|dt_rank)|ssm_state_size", at_most(8)),
    ],
    "inner widths": [
        (
            r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|intermediate_dim|dim_feedforward)",
            at_most(INNER),
        ),
        (
            r"(.*_)?(inner_dim|ffn_size|mlp_hidden_size|mlp_hidden_dim|feedforward_size|attention_hidden_size)",
            at_most(INNER),
        ),
    ],
    "windows": [
        (
            r"sliding_window|attention_window|local_attention|block_size|chunk_size|attention_chunk_size|num_(object_)?queries",
            each_at_most(8),
        ),
        (r"num_denoising|num_latents|index_topk|num_query_tokens|sliding_window_size", each_at_most(8)),
        (r"num_codebooks|num_quantizers|n_codebooks|codebook_size", each_at_most(8)),
        (r"num_conv_pos_embeddings|num_conv_pos_embedding_groups", each_at_most(4)),
    ],
}
KINDS = re.compile(
    r"layer_types|mlp_layer_types|layers_block_type|indexer_types|attention_layers|layer_rope_theta|block_types"
)
TOKEN = re.compile(r".*(_token_id|_token_index|_token_ids|_index|_id)")


def changes(config: Any, groups: frozenset[str], pixels: int = 2) -> Changes:
    """Keyword arguments for a new configuration of the same class, in which the groups' attributes are small."""
    new: Changes = {}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            new[name] = value.to_diff_dict() | {"model_type": value.model_type} | changes(value, groups, pixels)
        elif (found := changed(name, value, groups)) is not None and found != value:
            new[name] = found
    if "images" in groups:
        new |= images(values, pixels)
    if "layers" in groups:
        new |= patterns(values)
    if "vocabulary" in groups:
        new |= tokens(values)
    if "widths" in groups:
        new |= related(values, "sections" in groups)
    return new


MISSING = {  # what some configurations leave to the checkpoint
    "head_dim": HEAD_WIDTH,
    "vocab_size": VOCABULARY,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "prediction_length": 8,
    "vocabulary_map": {"<image>": VOCABULARY - 1},
}


def changed(name: str, value: Any, groups: frozenset[str]) -> Any:
    if value is None:
        return MISSING.get(name)
    sizes = value if isinstance(value, (list, tuple)) and value else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in sizes):
        return None
    for group in groups & GROUPS.keys():
        for pattern, rule in GROUPS[group]:
            if re.fullmatch(pattern, name):
                return rule(value)
    return None


def images(values: Changes, pixels: int) -> Changes:
    """Images of `pixels` patches a side, or of 32 pixels for each of them where the model has no patches."""
    patch = values.get("patch_size")
    patch = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch
    side = pixels * patch if isinstance(patch, int) and patch > 4 else 32 * pixels
    named = [
        name
        for name in ("image_size", "img_size", "input_size", "pretrain_image_size")
        if isinstance(values.get(name), (int, list, tuple))
    ]
    return {
        name: type(values[name])([side] * len(values[name])) if isinstance(values[name], (list, tuple)) else side
        for name in named
        if name != "input_size" or "image_size" in values
    }


def patterns(values: Changes) -> Changes:
    """Of lists with an entry for each layer, as many as there are layers now: all kinds of layers if they fit into four."""
    count = next(
        (k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if isinstance(values.get(k), int)), ""
    )
    total = values.get(count, 0)
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == total and total > 2}
    if not lists:
        return {}
    kinds = [v for k, v in lists.items() if KINDS.fullmatch(k)]
    rows = list(zip(*kinds, strict=True)) if kinds else [()] * total
    keep = sorted({row: place for place, row in reversed(list(enumerate(rows)))}.values())[:4]
    keep = sorted([*keep, *(place for place in range(total) if place not in keep)][: max(2, len(keep))])
    new: Changes = {k: type(v)(v[place] for place in keep) for k, v in lists.items()} | {count: len(keep)}
    if isinstance(values.get("per_layer_config"), dict):
        new["per_layer_config"] = {}
    return new


def tokens(values: Changes) -> Changes:
    """Special tokens beyond the vocabulary come to its end, each to a place of its own."""
    if not any(re.fullmatch(r"(.*_)?vocab_size", name) for name in values) and not any(
        "token" in name for name in values
    ):
        return {}
    new: Changes = {} if values.get("vocab_size", 0) is not None else {"pad_token_id": 1, "mask_token_id": 4}
    free = iter(range(VOCABULARY - 1, 0, -1))
    for name, value in values.items():
        if not TOKEN.fullmatch(name) or isinstance(value, bool):
            continue
        if isinstance(value, int) and value >= VOCABULARY - 20:
            new[name] = next(free)
        elif (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(v, int) for v in value)
            and max(value) >= VOCABULARY - 20
        ):
            new[name] = type(value)(next(free) for _ in value)
    return new


def related(values: Changes, sections: bool) -> Changes:
    """Sizes that are bound to others by a sum or a product."""
    new: Changes = {}
    if {"qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim"} <= values.keys():
        new["qk_head_dim"] = 2 * HEAD_WIDTH
    if "expand" in values or "mamba_expand" in values:
        new |= {
            name: 8
            for name in ("num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
            if values.get(name, 0) and values[name] > 8
        }
        new |= {
            name: 8 for name in ("mamba_d_head", "mamba_head_dim", "mamba_headdim") if isinstance(values.get(name), int)
        }
    if isinstance(many := values.get("num_key_value_heads"), int) and many == values.get("num_attention_heads"):
        new["num_key_value_heads"] = heads(HEADS)(many)
    if values.get("attn_layer_indices"):
        new["attn_layer_indices"] = [1]
    for name in ("width_coefficient", "depth_coefficient"):
        if isinstance(values.get(name), float):
            new |= {name: 0.1, "hidden_dim": 128}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values[name] if isinstance(values.get(name), dict) else {}
        if (section := rope.get("mrope_section")) or (rope and sections):
            new[name] = rope | {"mrope_section": [2, 1, 1][: len(section or "hwt")]}
    return new


def attempts() -> Iterator[tuple[frozenset[str], int]]:
    """Which groups to reduce, and how many patches an image has on a side: the smallest first."""
    every = frozenset({*GROUPS, "images"})
    for pixels in (2, 4):
        yield every, pixels
    yield every | {"sections"}, 2
    for left_out in (
        {"windows"},
        {"images"},
        {"inner widths"},
        {"windows", "images"},
        {"positions"},
        {"widths"},
        {"widths", "inner widths"},
    ):
        yield every - left_out, 2
    yield frozenset({"layers", "vocabulary"}), 2
    yield frozenset({"layers"}), 2
    yield every - {"layers"}, 2
    yield frozenset(), 2
