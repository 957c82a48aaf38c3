"""Recurrent layers that run as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.onednn import AfterBackward, gates_in_workspace, left_by_backward
from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.placement import Layout
from torch_secorder.per_sample import Outer, PerSampleGradient, SharedFactor, sign_vectors, sum_over
from torch_secorder.rules.node_rules import Gradients, NodeUse, node_rule

# How much gates that oneDNN kept may differ from computed ones. They are exact to a few 1e-7; numbers that are not the expected
# gate are nearly all off by far more.
TOLERANCE = 1e-5
SIGMOID, TANH = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


@node_rule(
    "MkldnnRnnLayerBackward0",
    lambda at: at.index in (1, 2, 3, 4) and _is_plain_lstm(at),
    reads=(
        "input",
        "output",
        "h0",
        "c0",
        "w_ih",
        "w_hh",
        "b_ih",
        "b_hh",
        "has_biases",
        "mode",
        "batch_sizes",
        "reverse",
    ),
    many=True,
)
def lstm_layer(at: NodeUse, grads: Gradients) -> PerSampleGradient | Tensor:
    """One direction of one layer of an LSTM, whose weights and biases are shared by the steps."""
    if "layer" not in at.memo:
        layer = _Layer(at.node)
        at.memo["layer"] = layer, SharedFactor(layer.gate_gradients(grads).transpose(0, 1)[:, None])
    layer, dz = at.memo["layer"]
    if at.index in (1, 2):
        return Outer((layer.x if at.index == 1 else layer.h).transpose(0, 1)[:, None], dz, at.shape)
    if "bias" not in at.memo:
        at.memo["bias"] = sum_over(dz.value, (1, 2))
    bias: Tensor = at.memo["bias"]
    return bias


def _is_plain_lstm(at: NodeUse) -> bool:
    mode_of_lstm = 2
    in_order = (at.placement.layout is Layout.ONE_EACH and at.placement.axis == len(at.output_shape) - 2) or at.n == 1
    return saved(at.node, "mode") == mode_of_lstm and not saved(at.node, "batch_sizes") and in_order


def _over(value: Tensor) -> Tensor | None:
    """Where a result is written: over a value that is no longer needed, or to a new tensor if a graph needs all values."""
    return None if torch.is_grad_enabled() else value


def _through(derivative: Any, g: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    """``g`` times the derivative of a nonlinearity with value ``y``, ``y (1 - y)`` or ``1 - y ** 2``, in one operation."""
    found: Tensor = derivative(g, y) if out is None else derivative.grad_input(g, y, grad_input=out)
    return found


def _vanishes(difference: Tensor, size: Tensor | float = 1.0) -> bool:
    return not difference.numel() or bool(difference.abs().max() <= TOLERANCE * size)


class _Layer:
    """What the forward of a layer left behind, with the steps in the order in which they were taken.

    Attributes:
        x: inputs, ``[t, n, i]``.
        h: hidden states before each step, ``[t, n, h]``.
        out: hidden states after each step, ``[t, n, h]``.
    """

    def __init__(self, node: Any):
        self._node = node
        self.x, self.out = self._in_order(saved(node, "input")), self._in_order(saved(node, "output"))
        h0 = saved(node, "h0").view_as(self.out[0])
        # Samples come first in memory, which makes products over one sample's steps faster.
        self.h = torch.cat([h0[:, None], self.out[:-1].transpose(0, 1)], 1).transpose(0, 1)

    def _in_order(self, value: Tensor) -> Tensor:
        return value.flip(0) if saved(self._node, "reverse") else value

    def gate_gradients(self, grads: Gradients) -> Tensor:
        """Gradients of the gates before their nonlinearities, ``[t, n, 4 h]``.

        A loop over the steps gives the cells and another one the gradients, as in Hochreiter and Schmidhuber (1997), "Long
        short-term memory". Neither is needed if oneDNN's own forward and backward left behind what the loops would find.
        """
        kept = gates_in_workspace(self._node)
        if kept is not None and (left := left_by_backward(self._node)) is not None:
            found = self._at_once(kept, left, grads)
            if found is not None:
                return found
        believed = kept is not None and self._ends_with_ours(kept)
        factors, to_cell, agree = self._factors(kept if kept is not None and believed else self._gates())
        if believed and not agree:
            factors, to_cell, _ = self._factors(self._gates())
        return self._backwards(factors, to_cell, grads)

    def _gates(self, steps: slice = slice(None), samples: slice = slice(None)) -> Tensor:
        """Input, forget, cell and output gates, ``[t, n, 4, h]``, computed for all steps at once from the known hidden states."""
        node, x, h = self._node, self.x[steps, samples], self.h[steps, samples]
        w_ih, w_hh = saved(node, "w_ih"), saved(node, "w_hh")
        with_bias = saved(node, "has_biases")
        bias = saved(node, "b_ih") + saved(node, "b_hh") if with_bias else w_ih.new_zeros(len(w_ih))
        z = torch.addmm(bias, x.flatten(0, 1), w_ih.T)
        z = torch.addmm(z, h.flatten(0, 1), w_hh.T, out=_over(z)).view(*h.shape[:2], 4, -1)
        ways = (torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)
        gates = [way(part, out=_over(part)) for way, part in zip(ways, z.unbind(2), strict=True)]
        return torch.stack(gates, 2) if torch.is_grad_enabled() else z

    def _ends_with_ours(self, gates: Tensor) -> bool:
        """Whether the last sample's gates at the last step equal computed ones.

        The hidden states cannot show that, since input and cell gates might have changed places.
        """
        return _vanishes(self._gates(slice(-1, None), slice(-1, None)) - gates[-1:, -1:])

    def _at_once(self, gates: Tensor, left: AfterBackward, grads: Gradients) -> Tensor | None:
        """All steps' gradients from what oneDNN left behind, or None if the two do not fit together.

        Each step sends back a product with its gates' gradients, which is checked along one direction for all of them.
        """
        dh_sent, dc_sent = left.to_hidden, left.to_cell
        factors, to_cell, agree = self._factors(gates, left.cells)
        if not agree:
            return None
        g_out, g_h, g_c = self._arriving(grads)
        dh, dc = torch.empty_like(to_cell), to_cell
        torch.add(g_out[:-1], dh_sent[1:], out=dh[:-1])
        torch.add(g_out[-1], g_h, out=dh[-1])
        torch.addcmul(dc_sent[1:], dh[:-1], to_cell[:-1], out=dc[:-1])
        dc[-1].mul_(dh[-1]).add_(g_c)
        factors[:, :, 1:4] *= dc[:, :, None]
        factors[:, :, 4] *= dh
        dz, w_hh, some = factors[:, :, 1:].flatten(2), saved(self._node, "w_hh"), slice((len(dh) - 1) % 8, None, 8)
        signs = sign_vectors(w_hh.shape, w_hh)[1]
        to_h, to_c = dz @ (w_hh @ signs), dc[some] * gates[some, :, 1]
        right = _vanishes(dh_sent @ signs - to_h, to_h.abs().max())
        return dz if right and _vanishes(dc_sent[some] - to_c, to_c.abs().max()) else None

    def _arriving(self, grads: Gradients) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The gradients of the hidden states, ``[t, n, h]``, and of the last hidden state and cell as outputs of their own."""
        g_out = torch.zeros_like(self.out) if grads[0] is None else self._in_order(grads[0])
        g_h, g_c = (0.0 if g is None else g.view_as(g_out[-1]) for g in grads[1:3])
        return g_out, g_h, g_c

    def _factors(self, gates: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, bool]:
        """The factors of gradients on their way back through a step, and whether gates agree with hidden states.

        The first tensor, ``[t, n, 5, h]``, has the factors from ``c_t`` to ``c_{t-1}`` and to the gates i, f and u, and from
        ``h_t`` to the gate o. The second, ``[t, n, h]``, has those from ``h_t`` to ``c_t``. If the cells are known, no loop over
        the steps follows, and the factor to ``c_{t-1}`` is not filled in.
        """
        (i, f, u, o), out = gates.unbind(2), self.out
        t, n, width = out.shape
        factors, cells = out.new_empty(n, t, 5, width).transpose(0, 1), out.new_empty(t + 1, n, width)
        to_before, to_i, to_f, to_u, to_o = map(_over, factors.unbind(2))
        if known is None:
            before, after = self._cells(cells, torch.mul(i, u, out=_over(cells[1:])), f)
        else:
            before, after = cells[:-1], cells[1:]
            cells[0], cells[1:-1] = saved(self._node, "c0").view_as(cells[0]), known
            torch.addcmul(i[-1] * u[-1], f[-1], before[-1], out=after[-1])
        to_i, to_f, to_u = _through(SIGMOID, u, i, to_i), _through(SIGMOID, before, f, to_f), _through(TANH, i, u, to_u)
        tanh_c = torch.tanh(after, out=_over(after))
        some = slice((t - 1) % 8, None, 8)
        agree = torch.is_grad_enabled() or _vanishes(o[some] * tanh_c[some] - out[some])
        to_o, to_cell = _through(SIGMOID, tanh_c, o, to_o), _through(TANH, o, tanh_c, _over(tanh_c))
        if to_before is None:
            return torch.stack([f, to_i, to_f, to_u, to_o], 2), to_cell, agree
        if known is None:
            to_before.copy_(f)
        return factors, to_cell, agree

    def _cells(self, cells: Tensor, entering: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """The cells before and after each step, ``[t, n, h]`` each, computed in the memory of ``cells``, ``[t + 1, n, h]``."""
        found = [saved(self._node, "c0").view_as(cells[0])]
        for new, kept in zip(entering.unbind(), f.unbind(), strict=True):
            found.append(torch.addcmul(new, kept, found[-1], out=_over(new)))
        if torch.is_grad_enabled():
            return torch.stack(found[:-1]), torch.stack(found[1:])
        cells[0] = found[0]
        return cells[:-1], cells[1:]

    def _backwards(self, factors: Tensor, to_cell: Tensor, grads: Gradients) -> Tensor:
        """The gate gradients, by a loop back through the steps that turns the factors into gradients."""
        g_out, g_h, g_c = self._arriving(grads)
        dh, dc = g_out[-1] + g_h, torch.zeros_like(g_out[-1]) + g_c
        w_hh, arriving, to_cells = saved(self._node, "w_hh"), g_out.unbind(), to_cell.unbind()
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
