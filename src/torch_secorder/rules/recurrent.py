"""Recurrent layers that run as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.per_sample import Factor, Outer, PerSampleGradient
from torch_secorder.rules.nodes import Gradients, Place, node_rule

# By how much gates that oneDNN kept may differ from ours. It is exact to a few 1e-7, and what isn't the gate that is expected is
# off by far more in most of the numbers.
TOLERANCE = 1e-4


@node_rule("MkldnnRnnLayerBackward0", lambda at: at.index in (1, 2, 3, 4) and _is_plain_lstm(at), many=True)
def lstm_layer(at: Place, grads: Gradients) -> PerSampleGradient | Tensor:
    """One direction of one layer of an LSTM: weights and biases are shared by the steps."""
    if "layer" not in at.memo:
        layer = _Layer(at.node)
        at.memo["layer"] = layer, Factor(layer.gate_gradients(grads).transpose(0, 1)[:, None])
    layer, dz = at.memo["layer"]
    if at.index in (1, 2):
        return Outer((layer.x if at.index == 1 else layer.h).transpose(0, 1)[:, None], dz, at.shape)
    if "bias" not in at.memo:
        at.memo["bias"] = dz.value.sum((1, 2))
    bias: Tensor = at.memo["bias"]
    return bias


def _is_plain_lstm(at: Place) -> bool:
    node, mode_of_lstm = at.node, 2
    in_order = (at.placement.fold == "none" and at.placement.axis == len(at.output_shape) - 2) or at.n == 1
    return node._saved_mode == mode_of_lstm and not node._saved_batch_sizes and in_order


def _over(value: Tensor) -> Tensor | None:
    """Where a result goes: over a value that is needed no more, or to a new place if a graph needs all values."""
    return None if torch.is_grad_enabled() else value


def _sigmoid_backward(g: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    """``g y (1 - y)``, in one go."""
    found: Tensor = (
        torch.ops.aten.sigmoid_backward(g, y)
        if out is None
        else torch.ops.aten.sigmoid_backward.grad_input(g, y, grad_input=out)
    )
    return found


def _tanh_backward(g: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    """``g (1 - y ** 2)``, in one go."""
    found: Tensor = (
        torch.ops.aten.tanh_backward(g, y)
        if out is None
        else torch.ops.aten.tanh_backward.grad_input(g, y, grad_input=out)
    )
    return found


def _vanishes(difference: Tensor) -> bool:
    return bool(difference.abs().max() < TOLERANCE)


class _Layer:
    """What the forward of a layer left behind, its steps in the order in which they were taken.

    Attributes:
        x: inputs, ``[t, n, i]``.
        h: hidden states before each step, ``[t, n, h]``.
        out: hidden states after each step, ``[t, n, h]``.
    """

    def __init__(self, node: Any):
        self._node = node
        self.x, self.out = self._in_order(node._saved_input), self._in_order(node._saved_result0)
        h0 = node._saved_hx_.view_as(self.out[0])
        # (Samples come first in memory: products over one sample's steps are faster then.)
        self.h = torch.cat([h0[:, None], self.out[:-1].transpose(0, 1)], 1).transpose(0, 1)

    def _in_order(self, value: Tensor) -> Tensor:
        return value.flip(0) if self._node._saved_reverse else value

    def gate_gradients(self, grads: Gradients) -> Tensor:
        """Gradients of the gates before their nonlinearities, ``[t, n, 4 h]``.

        A loop over the steps gives the cells and another one the gradients, as in Hochreiter and Schmidhuber (1997), "Long
        short-term memory".
        """
        kept = self._kept_gates()
        factors, to_cell, agree = self._factors(self._gates() if kept is None else kept)
        if kept is not None and not agree:
            factors, to_cell, _ = self._factors(self._gates())
        return self._backwards(factors, to_cell, grads)

    def _gates(self, steps: slice = slice(None), samples: slice = slice(None)) -> Tensor:
        """Input, forget, cell and output gates, ``[t, n, 4, h]``, of all steps at once, whose hidden states are known."""
        node, x, h = self._node, self.x[steps, samples], self.h[steps, samples]
        w_ih, w_hh = node._saved_weight0, node._saved_weight1
        bias = node._saved_weight2 + node._saved_weight3 if node._saved_has_biases else w_ih.new_zeros(len(w_ih))
        z = torch.addmm(bias, x.flatten(0, 1), w_ih.T)
        z = torch.addmm(z, h.flatten(0, 1), w_hh.T, out=_over(z)).view(*h.shape[:2], 4, -1)
        ways = (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)
        gates = [way(part, out=_over(part)) for way, part in zip(ways, z.unbind(2), strict=True)]
        return torch.stack(gates, 2) if torch.is_grad_enabled() else z

    def _kept_gates(self) -> Tensor | None:
        """The same from the workspace that oneDNN's forward left for its backward, or None if they aren't there.

        How that is laid out is nowhere promised: gates come first, those of one sample and step padded to a multiple of 16
        numbers that is none of 256. So the last ones are compared with ours, and others with the hidden states later on.
        """
        workspace, (t, n, width) = self._node._saved_result3, self.out.shape
        line = -(-4 * width // 16) * 16
        line += 16 if line % 256 == 0 else 0
        size = t * n * line * self.out.itemsize
        readable = workspace.dtype == torch.uint8 and workspace.is_contiguous() and workspace.numel() >= size
        if torch.is_grad_enabled() or self.out.dtype != torch.float32 or not readable:
            return None
        gates = workspace[:size].view(torch.float32).view(t, n, line)[..., : 4 * width].unflatten(2, (4, width))
        return gates if _vanishes(self._gates(slice(t - 1, t), slice(n - 1, n)) - gates[-1:, -1:]) else None

    def _factors(self, gates: Tensor) -> tuple[Tensor, Tensor, bool]:
        """What gradients are multiplied by on their way back through a step, and whether gates agree with hidden states.

        That of ``c_t`` on its way to ``c_{t-1}`` and the gates i, f and u, and that of ``h_t`` to the gate o, ``[t, n, 5, h]``;
        that of ``h_t`` to ``c_t``, ``[t, n, h]``.
        """
        (i, f, u, o), out = gates.unbind(2), self.out
        t, n, width = out.shape
        factors, cells = out.new_empty(n, t, 5, width).transpose(0, 1), out.new_empty(t + 1, n, width)
        to_before, to_i, to_f, to_u, to_o = map(_over, factors.unbind(2))
        before, after = self._cells(cells, torch.mul(i, u, out=_over(cells[1:])), f)
        to_i, to_f, to_u = _sigmoid_backward(u, i, to_i), _sigmoid_backward(before, f, to_f), _tanh_backward(i, u, to_u)
        tanh_c = torch.tanh(after, out=_over(after))
        some = slice((t - 1) % 8, None, 8)
        agree = torch.is_grad_enabled() or _vanishes(o[some] * tanh_c[some] - out[some])
        to_o, to_cell = _sigmoid_backward(tanh_c, o, to_o), _tanh_backward(o, tanh_c, _over(tanh_c))
        if to_before is None:
            return torch.stack([f, to_i, to_f, to_u, to_o], 2), to_cell, agree
        to_before.copy_(f)
        return factors, to_cell, agree

    def _cells(self, cells: Tensor, entering: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """The cells before and after each step, ``[t, n, h]``, in a place for ``[t + 1, n, h]`` of them."""
        found = [self._node._saved_cx_.view_as(cells[0])]
        for new, kept in zip(entering.unbind(), f.unbind(), strict=True):
            found.append(torch.addcmul(new, kept, found[-1], out=_over(new)))
        if torch.is_grad_enabled():
            return torch.stack(found[:-1]), torch.stack(found[1:])
        cells[0] = found[0]
        return cells[:-1], cells[1:]

    def _backwards(self, factors: Tensor, to_cell: Tensor, grads: Gradients) -> Tensor:
        """The way back through the steps; factors become gradients."""
        g_out, g_h, g_c = grads[:3]
        g_out = torch.zeros_like(self.out) if g_out is None else self._in_order(g_out)
        dh = g_out[-1] + (0 if g_h is None else g_h.view_as(g_out[-1]))
        dc = torch.zeros_like(dh) if g_c is None else g_c.view_as(dh).clone()
        w_hh, arriving, to_cells = self._node._saved_weight1, g_out.unbind(), to_cell.unbind()
        from_c, from_h = factors[:, :, :4].unbind(), factors[:, :, 4].unbind()
        all_dz, found = factors[:, :, 1:].flatten(2), []
        for t, dz in reversed([*enumerate(all_dz.unbind())]):
            dc = torch.addcmul(dc, dh, to_cells[t], out=_over(dc))
            along_c = torch.mul(dc[:, None], from_c[t], out=_over(from_c[t]))
            along_h = torch.mul(dh, from_h[t], out=_over(from_h[t]))
            if torch.is_grad_enabled():
                dz = torch.cat([along_c[:, 1:].flatten(1), along_h], 1)
                found.append(dz)
            dc = along_c[:, 0]
            if t:
                dh = torch.addmm(arriving[t - 1], dz, w_hh, out=_over(dh))
        return torch.stack(found[::-1]) if found else all_dz
