"""How many bits of float32 numbers are multiplied: torch's settings are read, the old ones and the new."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_secorder.autograd import product_bits as module
from torch_secorder.autograd.product_bits import BF16, DOUBLE, SINGLE, TF32, bits_of, product_bits
from torch_secorder.verification.tolerances import gradient_sum


def backends(
    matmul: str = "none", conv: str = "none", rnn: str = "none", onednn: tuple[str, str] = ("none", "none")
) -> Any:
    """The settings of today, in which an old one that is read raises: so does torch's where a new one was set."""
    one = lambda name: SimpleNamespace(fp32_precision=name)  # noqa: E731
    return SimpleNamespace(
        cuda=SimpleNamespace(matmul=one(matmul)),
        cudnn=SimpleNamespace(conv=one(conv), rnn=one(rnn)),
        mkldnn=SimpleNamespace(matmul=one(onednn[0]), conv=one(onednn[1])),
    )


def old_backends(matmul: bool, convolutions: bool) -> Any:
    """Those of versions before 2.9."""
    allowed = SimpleNamespace(allow_tf32=matmul)
    cudnn = SimpleNamespace(allow_tf32=convolutions)
    return SimpleNamespace(cuda=SimpleNamespace(matmul=allowed), cudnn=cudnn, mkldnn=SimpleNamespace())


@pytest.mark.parametrize(
    ("settings", "products", "everything"),
    [
        (backends(), SINGLE, SINGLE),
        (backends("ieee", "tf32", "tf32"), SINGLE, TF32),  # by default convolutions have it
        (backends("ieee", "ieee", "tf32"), SINGLE, TF32),
        (backends("tf32", "ieee", "ieee"), TF32, TF32),
        (old_backends(False, False), SINGLE, SINGLE),
        (old_backends(False, True), SINGLE, TF32),
        (old_backends(True, False), TF32, TF32),
    ],
)
def test_the_settings_of_cuda(settings: Any, products: int, everything: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "backends", settings)
    assert (product_bits("cuda", convolves=False), product_bits("cuda")) == (products, everything)
    assert product_bits("mps") == product_bits("pretend") == SINGLE


@pytest.mark.parametrize(
    ("settings", "asked", "bits"),
    [
        (backends(), "highest", SINGLE),
        (backends(onednn=("bf16", "none")), "medium", BF16),
        (backends(onednn=("none", "bf16")), "highest", BF16),
        (backends(onednn=("tf32", "none")), "high", TF32),
        (old_backends(False, False), "high", SINGLE),
        (old_backends(False, False), "medium", BF16),
    ],
)
def test_the_settings_of_onednn(settings: Any, asked: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "backends", settings)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: asked)
    assert product_bits("cpu") == product_bits("xpu") == bits


def test_what_torch_itself_says() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for asked, on_cuda in (("highest", SINGLE), ("high", TF32), ("medium", TF32)):
            torch.set_float32_matmul_precision(asked)
            assert product_bits("cuda", convolves=False) == on_cuda
        assert product_bits("cpu") == BF16
        assert gradient_sum(torch.float32, "cpu", False) == gradient_sum(torch.float32, "cpu", True)
        assert gradient_sum(torch.float64, "cpu", False) < 1e-6
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.backends.cudnn.allow_tf32
    assert product_bits("cuda") == TF32


def convolution(x: Tensor) -> Tensor:
    return nn.functional.conv1d(x[:, None], x[None, :1]).flatten(1)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product": lambda x: x @ x.mT,
    "a convolution": convolution,
    "behind a checkpoint": lambda x: checkpoint(convolution, x, use_reentrant=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_tells_whether_something_convolves(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "product_bits", lambda device, convolves: (device, convolves))
    x = torch.ones(3, 4, requires_grad=True)
    assert bits_of([WAYS[way](x)], [x]) == ("cpu", way != "a product")


@pytest.mark.parametrize(
    ("dtypes", "bits"),
    [
        ([torch.float32], SINGLE),
        ([torch.float32, torch.float64], DOUBLE),
        ([torch.complex64], SINGLE),
        ([torch.complex128], DOUBLE),
        ([torch.bfloat16, torch.float64], BF16),
        ([], SINGLE),
    ],
    ids=str,
)
def test_the_widest_dtype_counts_unless_there_is_half_precision(dtypes: list[torch.dtype], bits: int) -> None:
    assert bits_of([], [torch.zeros(1, dtype=dtype) for dtype in dtypes]) == bits
