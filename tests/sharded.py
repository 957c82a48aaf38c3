"""Models that ranks hold together, each with the same model in one piece: what tests/test_sharding.py compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

SIZES = [5, 3, 1, 8, 6, 2, 4, 7]  # of the batches, of which rank r takes every world-size-th
WORDS, LENGTH, CLASSES = 12, 8, 4  # one batch is as large as its sequences are long


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.size = width // heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    """With a position embedding that is called without a batch axis, and a parameter of no module's rule."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.words(ids) + self.positions(torch.arange(ids.shape[1]))) * self.gain
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1).clone())


class Language(nn.Module):
    """GPT-2, with its tied table."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import (  # here, since it takes processes without it seconds to import
            GPT2Config,
            GPT2LMHeadModel,
        )

        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": WORDS, "n_positions": LENGTH}
        self.lm = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, use_cache=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(ids).logits[:, -1, :CLASSES]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(LENGTH, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def frozen() -> nn.Module:
    """All but the norms, the gain and the head."""
    model = Transformer()
    for name, p in model.named_parameters():
        p.requires_grad_("n1" in name or "n2" in name or name.startswith(("norm", "head", "gain")))
    return model


def made(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return model().to(dtype)


def batch(number: int, model: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    n = SIZES[number]
    ids = torch.randint(WORDS, (n, LENGTH), generator=generator)
    return (ids.to(dtype) / WORDS if model is mlp else ids), torch.randint(CLASSES, (n,), generator=generator)


# Ways to hold a model together


def replicated(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def fully_sharded(model: nn.Module, mesh: DeviceMesh, *, checkpoints: bool = False, **options: Any) -> nn.Module:
    blocks = {Transformer: "blocks", Language: "lm.transformer.h"}.get(type(model), "")
    parts = model.get_submodule(blocks)
    for name, part in list(parts.named_children()):
        if next(part.parameters(), None) is not None:
            if checkpoints:
                part = checkpoint_wrapper(part)
                setattr(parts, name, part)
            fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> nn.Module:
    along = Shard(1) if sequence else Replicate()
    plan = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    plan |= {"attention.o": RowwiseParallel(output_layouts=along), "down": RowwiseParallel(output_layouts=along)}
    plan |= {"up": ColwiseParallel(input_layouts=along)}
    if sequence:
        unsharded_leaves = PrepareModuleInput(input_layouts=(along,), desired_input_layouts=(Replicate(),))
        plan |= {"n1": SequenceParallel(), "n2": SequenceParallel(), "attention": unsharded_leaves}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    ends = {"words": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    if sequence:
        ends |= {"blocks.0": split_along_sequence(), "norm": SequenceParallel()}
    return parallelize_module(model, mesh, ends)


def split_along_sequence() -> PrepareModuleInput:
    return PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)


def split_and_forgotten(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Sequence parallelism whose last norm nobody told that it sees a part of the positions only."""
    tensor_parallel(model, mesh, sequence=True)
    model.norm._forward_pre_hooks.clear()
    model.norm._forward_hooks.clear()
    model.norm.weight, model.norm.bias = (nn.Parameter(p.full_tensor()) for p in (model.norm.weight, model.norm.bias))
    return model


def both(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    tensor_parallel(model, mesh["tensor"])
    return fully_sharded(model, mesh["data"])


@dataclass(frozen=True)
class Setup:
    """A model, how it is spread, and how a monitor watches it."""

    model: Callable[[], nn.Module]
    spread: Callable[[nn.Module, DeviceMesh], nn.Module]
    watched: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    accumulates: bool = False
    scale: float = 1.0
    steps: int = 4  # of each rank: the sums of the fourth are not checked


HALVES = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SETUPS = {
    "DDP": Setup(Transformer, replicated),
    "DDP, no_sync": Setup(mlp, replicated, {"loss_scale": 0.5}, accumulates=True, scale=0.5),
    "FSDP2": Setup(mlp, fully_sharded),
    "FSDP2, transformer": Setup(Transformer, fully_sharded, {"diagonal": True, "per_sample": True}),
    "FSDP2, GPT-2": Setup(Language, fully_sharded, steps=2),
    "FSDP2, checkpointing": Setup(Transformer, partial(fully_sharded, checkpoints=True), steps=2),
    "FSDP2, bfloat16": Setup(Transformer, partial(fully_sharded, mp_policy=HALVES), dtype=torch.bfloat16, steps=2),
    "FSDP2, bfloat16, checkpointing": Setup(
        Transformer, partial(fully_sharded, mp_policy=HALVES, checkpoints=True), dtype=torch.bfloat16, steps=2
    ),
    "FSDP2, not resharded": Setup(Transformer, partial(fully_sharded, reshard_after_forward=False), steps=2),
    "FSDP2, no_sync": Setup(Transformer, fully_sharded, {"loss_scale": 0.5}, accumulates=True, scale=0.5),
    "FSDP2, scaled": Setup(mlp, fully_sharded, {"loss_scale": 1024.0, "activations": True}, scale=1024.0),
    "FSDP2, frozen": Setup(frozen, fully_sharded, steps=2),
    "FSDP2, frozen and analyzed": Setup(frozen, fully_sharded, {"parameters": "all"}, steps=2),
    "tensor": Setup(Transformer, tensor_parallel, {"diagonal": True, "per_sample": True}),
    "tensor, sequence": Setup(Transformer, partial(tensor_parallel, sequence=True), steps=2),
}


def turns(setup: Setup, ranks: int, rank: int) -> Sequence[int]:
    """The numbers of a rank's batches."""
    return range(rank, setup.steps * ranks, ranks)


def loss(setup: Setup, model: nn.Module, number: int) -> Tensor:
    x, y = batch(number, setup.model, setup.dtype)
    return F.cross_entropy(model(x), y) * setup.scale
