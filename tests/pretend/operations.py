"""What is known of operations: which launch nothing, which make the host wait, and how many kernels they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]

NO_LAUNCH = {  # views, and memory without numbers
    *(
        "view",
        "_unsafe_view",
        "view_as_real",
        "view_as_complex",
        "_reshape_alias",
        "alias",
        "detach",
        "expand",
        "as_strided",
    ),
    *(
        "t",
        "transpose",
        "permute",
        "movedim",
        "squeeze",
        "unsqueeze",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
    ),
    *("unbind", "unfold", "diagonal", "real", "imag", "_conj", "_neg_view", "lift_fresh", "set_", "resize_"),
    *("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "as_strided_", "detach_"),
    *("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "_local_scalar_dense", "sym_size"),
}
WAITS = {  # whose answer, or its size, goes to the host
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "argwhere"),
    *("repeat_interleave.Tensor", "_linalg_check_errors", "cholesky", "linalg_cholesky", "linalg_cholesky_ex"),
    *("linalg_inv", "linalg_inv_ex", "inverse", "_linalg_solve_ex", "linalg_solve", "linalg_lstsq", "lstsq"),
    *("linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex", "_linalg_eigh", "linalg_eig", "_linalg_eigvals"),
    *("_linalg_svd", "linalg_qr", "geqrf", "_linalg_det", "_linalg_slogdet", "linalg_ldl_factor_ex", "linalg_matrix_rank"),
}  # fmt: skip
# Which take a 0-dim tensor of the host beside tensors of a device, although they are not pointwise.
TAKE_NUMBERS = {"index_put", "index_put_", "_index_put_impl_", "masked_fill", "masked_fill_", "fill", "fill_", "where"}
# Whose lengths, or rows of each step, are on the host.
LENGTHS_ON_THE_HOST = {"_pack_padded_sequence", "_pack_padded_sequence_backward"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# As many tensors and blocks as one kernel of a foreach call takes, by how many lists it goes through, and a block's size.
TENSORS_OF_A_KERNEL, BLOCKS_OF_A_KERNEL, BLOCK = (110, 64, 48, 36, 30), 320, 65536
CONCATENATED_AT_ONCE = 128


@cache
def names(operation: Operation) -> tuple[str, str]:
    """An operation's name without and with its overload."""
    name = operation._schema.name.split("::")[1]
    return name, f"{name}.{operation._overloadname}"


@cache
def changes_view(operation: Operation) -> bool:
    """Whether an operation changes the shape of what it is given, as ``t_`` does."""
    return torch.Tag.inplace_view in operation.tags


@cache
def is_pointwise(operation: Operation) -> bool:
    return torch.Tag.pointwise in operation.tags


def asks_the_device(operation: Operation, args: Sequence[Any]) -> str:
    """Why the host waits for an operation, "" if it does not."""
    name, full = names(operation)
    if name in WAITS or full in WAITS:
        return name
    if name in INDEXED:
        return _asked_by_index(name, [i for i in args[1] if i is not None])
    return ""


def _asked_by_index(name: str, index: Sequence[Tensor]) -> str:
    if any(i.dtype in (torch.bool, torch.uint8) for i in index):
        return f"{name} by a mask"
    return f"{name} by a tensor of the host" if any(i.device.type == "cpu" for i in index) else ""


def kernels(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many kernels an operation launches."""
    name, _ = names(operation)
    if name in NO_LAUNCH:
        return 0
    if name.startswith("_foreach_"):
        lists = [
            x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)
        ]
        return _kernels_of_lists(lists) + (
            name in ("_foreach_norm", "_foreach_max")
        )  # of each tensor's blocks together
    if name in ("cat", "stack"):
        return -(-len(args[0]) // CONCATENATED_AT_ONCE)
    return 1


def _kernels_of_lists(lists: Sequence[Sequence[Tensor]]) -> int:
    """Of a call on lists of tensors: few for those that lie alike, one for each otherwise."""
    first = lists[0]
    everything = [x for tensors in lists for x in tensors]
    if len({x.dtype for x in everything}) > 1 or not all(x.is_contiguous() for x in everything):
        return len(first)
    most = TENSORS_OF_A_KERNEL[len(lists) - 1]
    count, tensors, blocks = 0, 0, 0
    for x in first:
        tensors, blocks = tensors + 1, blocks + -(-x.numel() // BLOCK)
        while tensors == most or blocks >= BLOCKS_OF_A_KERNEL:
            count, tensors, blocks = count + 1, 0, max(0, blocks - BLOCKS_OF_A_KERNEL)
    return count + (tensors > 0 or blocks > 0)
