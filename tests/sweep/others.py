"""Models of libraries other than transformers: timm's modules, vit-pytorch's, diffusers' and those of segmentation."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import SAMPLES, Inputs, numbers, words
from .making import PATIENCE, Made, NotMadeError, first_line, floating
from .stand_in import stand_in
from .tiny import timm_model, vit_model

LARGEST = 24_000_000  # parameters: these models can't be made as small as those with a configuration
SMALL = re.compile(r"test_|atto|femto|pico|nano|zepto|micro|tiny|mini|small|xxs|xs|_s0|_t\b|18|050|lite|_xx?s")


class Positional(nn.Module):
    """Takes one tensor by a name, as all models of the sweep are called, and gives it to the model by its place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def on_meta(build: Callable[[], nn.Module]) -> int | None:
    """The number of parameters, or None where the model can't be built so."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build().parameters())
    except Exception:
        return None


def tried(model: nn.Module, sets: Iterator[Inputs]) -> Made:
    """The model with the first inputs that it takes."""
    deadline, reason = time.monotonic() + PATIENCE, "no candidate for its inputs"
    for inputs in sets:
        try:
            outputs = copy.deepcopy(model)(**inputs)  # some keep tensors of a forward pass, with their graphs
            if used := floating(outputs, SAMPLES):
                sum(t.square().sum() for t in used.values()).backward()
                return Made(model, inputs)
            reason = "no output with a gradient whose first axis counts samples"
        except Exception as error:
            reason = first_line(error)
        if time.monotonic() > deadline:
            break
    raise NotMadeError(reason)


def timm_names() -> list[str]:
    stand_in()
    import timm

    return sorted(timm.list_modules())


DEPTHS: list[dict[str, Any]] = [
    {},
    {"depth": 2},
    {"depth": 2, "embed_dim": 48, "num_heads": 4},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"layers": [1, 1, 1, 1]},
    {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)},
    {"num_blocks": 2},
]


def timm_architecture(name: str) -> Made:
    """The smallest of the module's models, with as few blocks as its arguments allow."""
    stand_in()
    import timm

    if (known := timm_model(name)) is not None:
        return tried(Positional(known.eval()), ({"x": numbers(3, side, side)} for side in (64, 96, 128, 224)))
    models = sorted(timm.list_models(module=name), key=lambda n: (not SMALL.search(n), len(n)))[:4]
    sizes: dict[tuple[str, int, int], int] = {}
    for place, model in enumerate(models):
        for depth, arguments in enumerate(DEPTHS):
            for side in (64, 0):
                more = arguments | ({"img_size": side} if side else {})
                size = on_meta(lambda m=model, a=more: timm.create_model(m, num_classes=7, **a))
                if size is not None:
                    sizes[model, depth, side] = size
                    break
        if sizes and min(sizes.values()) < (3_000_000, 8_000_000, LARGEST, LARGEST)[place]:
            break
    if not sizes:
        raise NotMadeError("no model of the module can be built on the meta device")
    reason = ""
    for model, depth, side in sorted(sizes, key=lambda k: sizes[k])[:6]:
        if sizes[model, depth, side] > LARGEST:
            raise NotMadeError(reason or f"{sizes[model, depth, side]:,} parameters")
        torch.manual_seed(0)
        built = timm.create_model(model, num_classes=7, **DEPTHS[depth] | ({"img_size": side} if side else {})).eval()
        channels, *_, default = built.default_cfg.get("input_size", (3, 224, 224))
        try:
            sides = dict.fromkeys([side or 64, 96, 128, default])
            return tried(Positional(built), ({"x": numbers(channels, s, s)} for s in sides))
        except NotMadeError as error:
            reason = str(error)
    raise NotMadeError(reason)


VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48, "dim_head": 8,
    "seq_len": 32, "frames": 4, "image_patch_size": 8, "frame_patch_size": 2, "spatial_depth": 1, "temporal_depth": 1,
    "channels": 3, "num_memory_tokens": 2, "max_tokens_per_depth": (4, 2), "sm_dim": 16, "lg_dim": 32, "sm_patch_size": 8,
    "lg_patch_size": 16, "sm_enc_depth": 1, "sm_enc_heads": 2, "sm_enc_mlp_dim": 32, "sm_enc_dim_head": 8, "lg_enc_depth": 1,
    "lg_enc_heads": 2, "lg_enc_mlp_dim": 32, "lg_enc_dim_head": 8, "cross_attn_depth": 1, "cross_attn_heads": 2,
    "cross_attn_dim_head": 8, "cls_depth": 1, "local_patch_size": 4, "window_size": 4, "num_register_tokens": 2, "ndim": 2,
    "input_shape": (32, 32), "num_hierarchies": 2, "block_repeats": 1, "emb_dim": 32, "global_window_size": 4,
    "num_queries": 4, "num_parallel_branches": 2, "dim_conv_stem": 16, "pool_size": 2, "stages": 2, "num_specialized": 2,
    "freq_patch_size": 8, "num_residual_streams": 2,
}  # fmt: skip


def vit_names() -> list[str]:
    """Every class of vit-pytorch that is built from an image's size or a sequence's length and gives classes."""
    stand_in()
    import vit_pytorch

    found = []
    for module in pkgutil.iter_modules(vit_pytorch.__path__):
        try:
            loaded = importlib.import_module(f"vit_pytorch.{module.name}")
        except Exception:
            continue
        for name, kind in vars(loaded).items():
            own = inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == loaded.__name__
            if own and {"num_classes"} & inspect.signature(kind).parameters.keys():
                found.append(f"{module.name}.{name}")
    return sorted(found)


def vit_architecture(name: str) -> Made:
    stand_in()
    torch.manual_seed(0)
    if (known := vit_model(name)) is not None:
        model, shape = known
        return tried(Positional(model.eval()), iter([{"x": numbers(*shape)}]))
    module, _, kind = name.rpartition(".")
    built = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)
    takes = inspect.signature(built).parameters
    reason = ""
    for patch in (8, 4, 2):
        sizes = VIT | {"patch_size": patch, "image_patch_size": patch}
        chosen = {
            k: v
            for k, v in sizes.items()
            if k in takes and (takes[k].default is inspect.Parameter.empty or k in ("dim_head", "depth", "dim"))
        }
        for left in ({}, {"depth": (1, 1)}, {"depth": (1, 1, 1)}, {"dim": (16, 32, 48, 64), "depth": (1, 1, 1, 1)}):
            try:
                torch.manual_seed(0)
                model = built(**chosen | {k: v for k, v in left.items() if k in takes}).eval()
                shapes = ((3, 32, 32), (3, 4, 32, 32), (3, 32), (4, 3, 32, 32), (3, 64, 64), (3, 224, 224))
                return tried(Positional(model), ({"x": numbers(*s)} for s in shapes))
            except Exception as error:
                reason = str(error) if isinstance(error, NotMadeError) else first_line(error)
    raise NotMadeError(reason)


def segmentation_names() -> list[str]:
    stand_in()
    import segmentation_models_pytorch as smp

    kinds = [n for n, k in vars(smp).items() if inspect.isclass(k) and issubclass(k, nn.Module)]
    return sorted([f"{kind} {PLAIN}" for kind in kinds] + [f"Unet {encoder}" for encoder in ENCODERS])


PLAIN = "tu-test_resnet"  # Encoders of timm ("tu-"), since the library's own are subclasses of torchvision's.
ENCODERS = (
    "tu-mobilenetv2_050",
    "tu-efficientnet_lite0",
    "tu-densenet121",
    "tu-vgg11",
    "tu-dpn68",
    "mit_b0",
    "mobileone_s0",
    "tu-regnetx_002",
)
DPT: dict[str, Any] = {
    "decoder_intermediate_channels": (16, 32, 48, 64),
    "decoder_fusion_channels": 32,
    "dynamic_img_size": True,
}


def segmentation_architecture(name: str) -> Made:
    stand_in()
    import segmentation_models_pytorch as smp

    kind, encoder = name.split()
    torch.manual_seed(0)
    more = DPT if kind == "DPT" else {}
    encoder = encoder if kind != "DPT" else "tu-vit_tiny_patch16_224"
    model = getattr(smp, kind)(encoder, encoder_weights=None, classes=2, **more).eval()
    return tried(Positional(model), ({"x": numbers(3, side, side)} for side in (64, 96, 128, 224)))


X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "rotary": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "relative position bias": {"rel_pos_bias": True},
    "dynamic position bias": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "RMSNorm": {"use_rmsnorm": True},
    "simple RMSNorm": {"use_simple_rmsnorm": True},
    "scale norm": {"use_scalenorm": True},
    "GLU with swish": {"ff_glu": True, "ff_swish": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "one key and value head": {"attn_one_kv_head": True},
    "key and value heads": {"attn_kv_heads": 2},
    "memory keys and values": {"attn_num_mem_kv": 3},
    "normalized queries and keys": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "gated residual": {"gate_residual": True},
    "gated values": {"attn_gate_values": True},
    "attention on attention": {"attn_on_attn": True},
    "residual attention": {"residual_attn": True},
    "macaron": {"macaron": True},
    "sandwich": {"sandwich_coef": 1},
    "scaled residual": {"scale_residual": True},
    "hyper connections": {"num_residual_streams": 2},
    "shifted tokens": {"shift_tokens": 1},
    "sparse top-k attention": {"attn_sparse_topk": 3},
    "latent keys and values": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 8},
    "norm after": {"pre_norm": False},
    "softclamped logits": {"attn_softclamp_logits": True},
    "lasers": {"attn_laser": True},
    "dynamic tanh": {"use_dynamic_tanh": True},
}


def x_names() -> list[str]:
    return list(X_TRANSFORMERS)


def x_architecture(name: str) -> Made:
    from x_transformers import Decoder, TransformerWrapper

    options = X_TRANSFORMERS[name]
    torch.manual_seed(0)
    try:
        layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    except Exception as error:
        raise NotMadeError(first_line(error)) from error
    model = TransformerWrapper(num_tokens=40, max_seq_len=16, attn_layers=layers).eval()
    return tried(Positional(model), iter([{"x": words(7, 40)}]))
