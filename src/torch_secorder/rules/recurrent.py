"""Recurrent layers that run as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.per_sample import Outer, PerSampleGradient
from torch_secorder.rules.nodes import Gradients, Place, node_rule


@node_rule("MkldnnRnnLayerBackward0", lambda at: at.index in (1, 2, 3, 4) and _is_plain_lstm(at), many=True)
def lstm_layer(at: Place, grads: Gradients) -> PerSampleGradient | Tensor:
    """One direction of one layer of an LSTM: weights and biases are shared by the steps."""
    if "steps" not in at.memo:
        at.memo["steps"] = _lstm_steps(at.node, grads)
    x, h, dz = at.memo["steps"]
    if at.index in (3, 4):
        return dz.sum(0)
    return Outer((x if at.index == 1 else h).transpose(0, 1)[:, None], dz.transpose(0, 1)[:, None], at.shape)


def _is_plain_lstm(at: Place) -> bool:
    node, mode_of_lstm = at.node, 2
    in_order = (at.placement.fold == "none" and at.placement.axis == len(at.output_shape) - 2) or at.n == 1
    return node._saved_mode == mode_of_lstm and not node._saved_batch_sizes and in_order


def _lstm_steps(node: Any, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, previous hidden states and gradients of the gates before their nonlinearity, ``[t, n, ...]`` each.

    The outputs that the layer saved are its hidden states, so the gates of all steps are one matrix product; the cells need a
    loop over steps and the gradients another one, as in Hochreiter and Schmidhuber (1997), "Long short-term memory".
    """
    x, out, w_ih, w_hh = node._saved_input, node._saved_result0, node._saved_weight0, node._saved_weight1
    h0, c0 = node._saved_hx_.view_as(out[0]), node._saved_cx_.view_as(out[0])
    g_out, g_h, g_c = (None if g is None else g for g in grads[:3])
    if node._saved_reverse:
        x, out, g_out = x.flip(0), out.flip(0), None if g_out is None else g_out.flip(0)
    h = torch.cat([h0[None], out[:-1]])
    bias = node._saved_weight2 + node._saved_weight3 if node._saved_has_biases else w_ih.new_zeros(len(w_ih))
    z = torch.addmm(torch.addmm(bias, x.flatten(0, 1), w_ih.T), h.flatten(0, 1), w_hh.T)
    i, f, u, o = z.view(*out.shape[:2], 4, -1).unbind(2)
    i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
    entering, cells = i * u, [c0]
    for new, kept in zip(entering.unbind(), f.unbind(), strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    before, tanh_c = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
    # What multiplies the gradient of c_t on its way to the gates i, f and u, and that of h_t on its way to o and to c_t.
    to_gates = torch.stack([entering * (1 - i), before * f * (1 - f), i * (1 - u * u)], 2).unbind()
    to_o, to_cell = (tanh_c * o * (1 - o)).unbind(), (o * (1 - tanh_c * tanh_c)).unbind()
    zero = out.new_zeros(out[0].shape)
    dc = zero if g_c is None else g_c.view_as(zero)
    dh = zero if g_h is None else g_h.view_as(zero)
    from_out = [zero] * len(x) if g_out is None else g_out.unbind()
    dh = dh + from_out[-1]
    forgets, steps = f.unbind(), []
    for t in reversed(range(len(x))):
        dc = torch.addcmul(dc, dh, to_cell[t])
        dz = torch.cat([(dc[:, None] * to_gates[t]).flatten(1), dh * to_o[t]], 1)
        steps.append(dz)
        if t:
            dh, dc = torch.addmm(from_out[t - 1], dz, w_hh), dc * forgets[t]
    return x, h, torch.stack(steps[::-1])
