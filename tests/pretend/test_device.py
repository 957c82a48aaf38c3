"""The pretend device does what a device does: it exists, keeps tensors apart, computes, differentiates, and ends cleanly."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretend

HERE = {"device": "pretend"}
THERE = {"device": "pretend:1"}


def test_tensors_are_made_on_the_device_that_is_asked_for() -> None:
    for made in (torch.ones(3, **HERE), torch.arange(3, **HERE), torch.randn(3, **HERE), torch.tensor([1.0], **HERE)):
        assert made.device == torch.device("pretend:0")
    one = torch.zeros(3, **THERE)
    assert one.device == torch.device("pretend:1")
    assert {(one + 1).device, one.new_zeros(2).device, torch.rand_like(one).device, one.new_tensor([1.0]).device} == {
        one.device
    }


def test_a_default_device_is_followed() -> None:
    with torch.device("pretend"):
        model = nn.Linear(2, 3)
        assert (
            model.weight.device.type
            == model(torch.ones(4, 2)).device.type
            == torch.tensor(1.0).device.type
            == "pretend"
        )
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize("operation", [torch.add, torch.matmul, torch.dot, lambda x, y: torch.cat([x, y])])
@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(3, **THERE)], ids=["host", "another device"])
def test_devices_do_not_mix(operation: Any, other: Tensor) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation(torch.ones(3, **HERE), other)


def test_a_number_of_the_host_mixes_where_a_gpu_takes_it() -> None:
    x = torch.ones(3, **HERE)
    assert (x * torch.tensor(2.0)).sum().item() == 6
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([x[0], torch.tensor(2.0)])
    with pytest.raises(RuntimeError, match="same device"):
        x[0] + torch.ones((), **THERE)


def test_a_generator_of_the_host_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'pretend' device type for generator but found 'cpu'"):
        torch.randn(3, generator=torch.Generator(), **HERE)


def test_numbers_are_those_of_the_cpu() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4), nn.LayerNorm(4))
    x, y = torch.randn(5, 2, 5, 5), torch.randint(4, (5,))
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad for p in model.parameters()]
    other = pretend.moved(copy.deepcopy(model))
    other.zero_grad()
    other[1].reset_running_stats()
    F.cross_entropy(other(pretend.moved(x)), pretend.moved(y)).backward()
    for p, grad in zip(other.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.cpu(), grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_those_of_the_cpu(kind: type[nn.RNNBase], bias: bool) -> None:
    layer, rows = kind(3, 4, num_layers=2, bias=bias), [torch.randn(n, 3) for n in (4, 2, 1)]
    packed = nn.utils.rnn.pack_sequence(rows)
    layer(packed)[0].data.square().sum().backward()
    expected = [p.grad for p in layer.parameters()]
    other = pretend.moved(copy.deepcopy(layer))
    packed = nn.utils.rnn.pack_sequence(pretend.moved(rows))
    assert (packed.data.device.type, packed.batch_sizes.device.type) == ("pretend", "cpu")
    other(packed)[0].data.square().sum().backward()
    for p, grad in zip(other.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.cpu(), grad)


def test_backward_passes_run_in_a_thread_of_the_device() -> None:
    seen = []
    x = torch.ones(3, requires_grad=True, **HERE)
    y = x * 2
    y.register_hook(lambda _: seen.append(threading.current_thread()))
    y.sum().backward()
    assert seen != [threading.current_thread()]


def test_gradients_come_back_to_the_device_that_they_are_of() -> None:
    x, w = torch.ones(3, requires_grad=True, **HERE), torch.full((3,), 2.0, requires_grad=True, **THERE)
    y = x.to("pretend:1") * w
    assert y.device.index == 1
    y.cpu().sum().backward()
    assert (x.grad.device.index, w.grad.device.index) == (0, 1)
    assert (x.grad.tolist(), w.grad.tolist()) == ([2, 2, 2], [1, 1, 1])


def test_addresses_differ_and_views_share_theirs() -> None:
    x, y = torch.ones(4, **HERE), torch.ones(4, **HERE)
    assert x.data_ptr() != y.data_ptr() != 0
    assert x.view(2, 2).data_ptr() == x.data_ptr()
    assert x[1:].data_ptr() == x.data_ptr() + 4
    x.view(2, 2).zero_()
    assert x.sum().item() == 0


def test_in_place_operations_give_back_their_tensor() -> None:
    x = torch.ones(2, 3, **HERE)
    assert x.add_(1) is x
    assert x.t_() is x
    assert x.shape == (3, 2)
    out = torch.empty(3, 2, **HERE)
    assert torch.mul(x, 2, out=out) is out
    assert out.sum().item() == 24


def test_float64_is_refused_on_request() -> None:
    assert torch.ones(2, **HERE).double().dtype == torch.float64
    with pretend.without_float64():
        for make in (lambda: torch.ones(2, **HERE).double(), lambda: torch.zeros(1, dtype=torch.float64, **HERE)):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()
        assert torch.ones(2, **HERE).cpu().double().dtype == torch.float64


def test_autocast_is_that_of_a_gpu() -> None:
    layer, x = nn.Linear(3, 2, **HERE), torch.ones(4, 3, **HERE)
    with torch.autocast("pretend", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        assert F.mse_loss(out, out).dtype == torch.float32
        with torch.autocast("pretend", enabled=False):
            assert layer(x).dtype == torch.float32
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_modules_are_moved_with_their_ties_copied_and_saved() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    moved = pretend.moved(model, 1)
    assert moved[2].weight is moved[0].weight
    assert {x.device.index for x in (*moved.parameters(), *moved.buffers())} == {1}
    assert isinstance(moved[0].weight, nn.Parameter)
    copied = copy.deepcopy(moved)
    assert copied[2].weight is copied[0].weight is not moved[0].weight
    file = io.BytesIO()
    torch.save(moved.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["0.weight"]
    assert (loaded.device, loaded.tolist()) == (torch.device("pretend:1"), moved[0].weight.tolist())


def test_data_may_be_exchanged() -> None:
    layer = nn.Linear(2, 2, **HERE)
    weight, numbers = layer.weight, layer.weight.tolist()
    layer.double()
    assert layer.weight is weight
    assert (weight.dtype, weight.tolist()) == (torch.float64, numbers)
    weight.data = torch.zeros(2, 2, **HERE)
    assert weight.sum().item() == 0
    weight.data.fill_(1)
    assert weight.sum().item() == 4
    with torch.no_grad():
        weight.set_(torch.full((2, 2), 3.0, **HERE))
    assert weight.sum().item() == 12


def test_a_tensor_is_copied_as_torchs_own_are() -> None:
    x = torch.ones(2, requires_grad=True, **HERE)
    (x * 2).sum().backward()
    assert copy.deepcopy(x).grad.tolist() == [2, 2]
    parameter = nn.Parameter(x.detach())
    (parameter * 2).sum().backward()
    assert copy.deepcopy(parameter).grad is None
    assert x.to("pretend", copy=True).data_ptr() != x.to("pretend").data_ptr() == x.data_ptr()
    assert not vars(x)  # a program's own attributes are all that is there
    assert f"{x.sum():.1f}" == "2.0"


def test_the_host_cannot_read_what_is_on_the_device() -> None:
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        torch.ones(2, **HERE).numpy()


PROGRAM = """
import torch, pretend
pretend.register()
x = torch.ones(3, requires_grad=True, device="pretend")
y = x * 2
def bad(*_):
    raise ValueError("of a hook")
class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1
    @staticmethod
    def backward(ctx, grad):
        raise ValueError("of a hook")
def at_the_end(*_):
    torch.autograd.Variable._execution_engine.queue_callback(bad)
{}
try:
    y.sum().backward()
except ValueError as error:
    print("caught", error)
x.grad = None
(x * 3).sum().backward()
print(x.grad.tolist())
"""
WAYS = {
    "a tensor's hook": "y.register_hook(bad)",
    "a node's hook": "y.grad_fn.register_hook(bad)",
    "a node's prehook": "y.grad_fn.register_prehook(bad)",
    "a function": "y = Bad.apply(y)",
    "the end of the pass": "y.register_hook(at_the_end)",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_process_survives_an_error_in_the_device_thread_and_ends_cleanly(way: str) -> None:
    folder = str(Path(pretend.__file__).parents[1])
    program = [sys.executable, "-c", PROGRAM.format(WAYS[way])]
    ended = subprocess.run(program, capture_output=True, text=True, cwd=folder, timeout=120)
    assert (ended.stdout, ended.returncode) == ("caught of a hook\n[3.0, 3.0, 3.0]\n", 0), ended.stderr
