"""Arguments for tiny models of classes that have no configuration, or whose library fixes their sizes by names."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

Arguments = dict[str, Any]
Shape = tuple[int, ...]  # of one sample

VIT: Arguments = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
CCT: Arguments = {"embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_classes": 7, "sequence_length": 16}
CCT |= {"stochastic_depth_rate": 0.0}  # which the library draws in evaluation mode, too
IMAGE, LARGE_IMAGE, FOUR = (3, 32, 32), (3, 64, 64), (1, 1, 1, 1)
SIZES, HEADS = (16, 32, 48, 64), (1, 2, 3, 4)

VIT_PYTORCH: dict[str, tuple[Arguments, Shape]] = {
    "look_vit.LookViT": (
        {"dim": 32, "image_size": 48, "num_classes": 7, "depth": 1, "patch_size": 16, "heads": 4, "dim_head": 8}
        | {"highres_patch_size": 12, "cross_attn_heads": 2, "cross_attn_dim_head": 8},
        (3, 48, 48),
    ),
    "cross_vit.CrossViT": (
        {"image_size": 32, "num_classes": 7, "depth": 2, "sm_dim": 16, "sm_patch_size": 8, "sm_enc_heads": 2}
        | {"sm_enc_mlp_dim": 32, "sm_enc_dim_head": 8, "lg_dim": 32, "lg_patch_size": 16, "lg_enc_depth": 1}
        | {"lg_enc_heads": 2, "lg_enc_mlp_dim": 32, "lg_enc_dim_head": 8}
        | {"cross_attn_depth": 1, "cross_attn_heads": 2, "cross_attn_dim_head": 8},
        IMAGE,
    ),
    "cct.TransformerClassifier": (CCT, (16, 32)),
    "cct_3d.TransformerClassifier": (CCT, (16, 32)),
    "looped_vit.LoopedViT": (
        {k: VIT[k] for k in VIT if k != "depth"}
        | {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 2, "dim_head": 8},
        IMAGE,
    ),
    "levit.LeViT": (
        {"image_size": 64, "num_classes": 7, "dim": (16, 32), "depth": 1, "heads": (2, 4), "mlp_mult": 2, "stages": 2}
        | {"dim_key": 8, "dim_value": 16},
        LARGE_IMAGE,
    ),
    "mobile_vit.MobileViT": (
        {"image_size": (64, 64), "dims": [16, 24, 32], "num_classes": 7, "depths": (1, 1, 1)}
        | {"channels": [8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 48]},
        LARGE_IMAGE,
    ),
    "na_vit_nested_tensor_3d.NaViT": (VIT | {"max_frames": 4, "frame_patch_size": 2, "dim_head": 8}, (3, 4, 32, 32)),
    "scalable_vit.ScalableViT": (
        {"num_classes": 7, "dim": 16, "heads": (1, 2, 4, 4), "depth": FOUR, "reduction_factor": (8, 4, 2, 1)}
        | {"window_size": (8, 4, None, None)}
        | {"iwsa_dim_key": 8, "iwsa_dim_value": 8, "ssa_dim_key": 8, "ssa_dim_value": 8},
        LARGE_IMAGE,
    ),
    "wwt.WWT": (VIT | {"num_slots": 4, "dim_head": 8}, IMAGE),
    "local_vit.LocalViT": (VIT | {"dim_head": 8}, IMAGE),
    "t2t.T2TViT": (VIT | {"image_size": 64, "dim_head": 8, "t2t_layers": ((3, 2), (3, 2))}, LARGE_IMAGE),
    "twins_svt.TwinsSVT": (
        {"num_classes": 7}
        | {f"s{stage}_emb_dim": size for stage, size in zip((1, 2, 3, 4), (16, 16, 32, 32), strict=True)}
        | {f"s{stage}_local_patch_size": size for stage, size in zip((1, 2, 3, 4), (4, 4, 4, 2), strict=True)}
        | {f"s{stage}_global_k": size for stage, size in zip((1, 2, 3, 4), (4, 4, 2, 2), strict=True)}
        | {"s3_depth": 1, "s4_depth": 1},
        LARGE_IMAGE,
    ),
}
NDIM: Arguments = {"ndim": 2, "input_shape": (32, 32), "dim_head": 8} | {k: VIT[k] for k in VIT if k != "image_size"}
VIT_PYTORCH |= {f"{file}.ViTND": (NDIM, IMAGE) for file in ("vit_nd", "vit_nd_pope", "vit_nd_rotary")}


def vit_model(name: str) -> tuple[nn.Module, Shape] | None:
    """A model of vit-pytorch with the shape of one sample; None for a class whose arguments are not known here."""
    file, _, kind = name.rpartition(".")
    module = importlib.import_module(f"vit_pytorch.{file}")
    if name == "efficient.ViT":
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        plain = {k: VIT[k] for k in ("image_size", "patch_size", "num_classes", "dim")}
        return module.ViT(**plain, transformer=nn.TransformerEncoder(layer, 1)), IMAGE
    if name == "learnable_memory_vit.Adapter":
        return module.Adapter(vit=module.ViT(**VIT), num_classes=7, num_memories_per_layer=2), IMAGE
    if name not in VIT_PYTORCH:
        return None
    arguments, shape = VIT_PYTORCH[name]
    return getattr(module, kind)(**arguments), shape


TIMM: dict[str, tuple[str, Arguments]] = {  # a module of timm's -> its class, and arguments
    "convmixer": ("ConvMixer", {"dim": 32, "depth": 2}),
    "mlp_mixer": ("MlpMixer", {"img_size": 64, "num_blocks": 2, "embed_dim": 32}),
    "focalnet": ("FocalNet", {"embed_dim": 16, "depths": FOUR}),
    "metaformer": ("MetaFormer", {"depths": FOUR, "dims": SIZES}),
    "hiera": ("Hiera", {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": FOUR}),
    "hieradet_sam2": ("HieraDet", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    "nextvit": ("NextViT", {"in_chans": 3, "stem_chs": (16, 8, 16), "depths": (1, 1, 4, 1)}),
    "levit": ("Levit", {"img_size": 64, "embed_dim": (32, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 3)}),
    "pit": (
        "PoolingVisionTransformer",
        {"img_size": 64, "base_dims": (16,) * 3, "depth": (1,) * 3, "heads": (1, 2, 4)},
    ),
    "lowformer": (
        "LowFormer",
        {"width_list": [8, 16, 16, 32, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": (64, 64)},
    ),
    "rdnet": ("RDNet", {"growth_rates": (8,) * 7, "num_blocks_list": (1,) * 7, "num_init_features": 16}),
    "davit": ("DaVit", {"depths": FOUR, "embed_dims": SIZES, "num_heads": HEADS}),
    "crossvit": (
        "CrossVit",
        {
            "img_size": 64,
            "embed_dim": (16, 32),
            "depth": ((1, 1, 1),),
            "num_heads": (2, 4),
            "mlp_ratio": (2.0, 2.0, 1.0),
        },
    ),
    "vgg": ("VGG", {"cfg": [16, "M", 32, "M", 32, "M", 32, "M", 32, "M"], "mlp_ratio": 0.02}),
    "vovnet": (
        "VovNet",
        {
            "cfg": {"stem_chs": [16] * 3, "stage_conv_chs": [16] * 4, "stage_out_chs": [16, 32, 32, 48]}
            | {"layer_per_block": 2, "block_per_stage": [1] * 4, "residual": True, "depthwise": False, "attn": "ese"}
        },
    ),
}


def timm_model(name: str) -> nn.Module | None:
    """A model of a module of timm's; None for one whose arguments are not known here."""
    module = importlib.import_module(f"timm.models.{name}")
    if name == "mvitv2":
        config = module.MultiScaleVitCfg(depths=FOUR, embed_dim=16, num_heads=1)
        return module.MultiScaleVit(config, img_size=(64, 64), num_classes=7)
    if name not in TIMM:
        return None
    kind, arguments = TIMM[name]
    return getattr(module, kind)(num_classes=7, **arguments)
