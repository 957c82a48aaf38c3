"""Autocast on the device: products in half precision, sums and losses in single precision, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

KEY = "AutocastPrivateUse1"
HALF = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "einsum", "scaled_dot_product_attention")
HALF += (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
)
SINGLE = (
    "layer_norm",
    "group_norm",
    "softmax.int",
    "log_softmax.int",
    "mse_loss",
    "nll_loss",
    "nll_loss_nd",
    "cross_entropy_loss",
)
SINGLE += ("exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList", "binary_cross_entropy_with_logits")


def register_autocast(name: str) -> list[torch.library.Library]:
    """Teach autocast the device; what is returned has to be kept."""
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, KEY)
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((HALF, lambda: torch.get_autocast_dtype(name)), (SINGLE, lambda: torch.float32)):
        for full in names:
            library.impl(full, _cast(full, name, dtype), KEY)
    return [rest, library]


def _cast(full: str, device: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """The operation, called with its tensors of the device in that dtype."""
    packet, _, overload = full.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def called(*args: Any, **kwargs: Any) -> Any:
        def cast(x: Tensor) -> Tensor:
            there = x.device.type == device and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype()) if there else x

        with torch.autocast(device, enabled=False):
            return operation(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))

    return called
