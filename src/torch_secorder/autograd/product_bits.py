"""How many bits the numbers have that gradients are sums of, which is what the checks' tolerances go by.

Products of float32 numbers may be taken of fewer bits than these have: of 11 (TF32) on NVIDIA's cards, which torch allows for
convolutions by default, and of 8 (bfloat16) on some CPUs. torch's settings say so, the newer ones for each kind of operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from torch_secorder.autograd.precision import has_half_precision, nodes_of

DOUBLE, SINGLE, TF32, BF16 = 53, 24, 11, 8

# What the newer settings call the numbers that are multiplied.
_BITS = {"tf32": TF32, "bf16": BF16, "fp16": TF32}
# In the names of nodes that multiply by cuDNN, or hide whether something does.
_CONVOLVES = ("Convolution", "Rnn", "Checkpoint")


def bits_of(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """The bits of the numbers that gradients are sums of.

    Args:
        values: outputs and losses, with the graph that they were computed in.
        parameters: what is differentiated by; a model in float64 may have parts in float32, too.
    """
    if has_half_precision(*values, *parameters):
        return BF16
    if most_bits(parameters) == DOUBLE:
        return DOUBLE
    devices = {p.device.type for p in parameters}
    with_all, without = (min((product_bits(d, kind) for d in devices), default=SINGLE) for kind in (True, False))
    if with_all == without:
        return with_all
    return with_all if any(word in node.name() for node in nodes_of(values) for word in _CONVOLVES) else without


def most_bits(parameters: Sequence[Tensor]) -> int:
    """The bits that there would be if no product were rounded to fewer; no graph is looked through to know them."""
    widest = reduce(torch.promote_types, [p.dtype for p in parameters], torch.float32)
    return DOUBLE if widest in (torch.float64, torch.complex128) else SINGLE


def product_bits(device_type: str, convolves: bool = True) -> int:
    """The bits of float32 numbers in products on a device; ``convolves`` if some are those of convolutions or recurrences."""
    if device_type == "cuda":
        found = [_set_to(torch.backends.cuda, "matmul") or (TF32 if torch.backends.cuda.matmul.allow_tf32 else SINGLE)]
        kinds = [_set_to(torch.backends.cudnn, kind) for kind in ("conv", "rnn")] if convolves else []
        return min([*found, *(kind or (TF32 if torch.backends.cudnn.allow_tf32 else SINGLE) for kind in kinds)])
    if device_type in ("cpu", "xpu"):  # both by oneDNN
        matmul = _set_to(torch.backends.mkldnn, "matmul")
        found = [matmul or (BF16 if torch.get_float32_matmul_precision() == "medium" else SINGLE)]
        return min([*found, (convolves and _set_to(torch.backends.mkldnn, "conv")) or SINGLE])
    return SINGLE


def _set_to(backend: object, kind: str) -> int | None:
    """What the newer setting of a kind of operation says; None where torch has none. Where it is set, no old one can be read."""
    name = getattr(getattr(backend, kind, None), "fp32_precision", None)
    return None if name is None else _BITS.get(name, SINGLE)
