"""Layers of other libraries that are recognized by their code, whatever their class is called.

Model libraries write the same few layers again and again: transformers has more than a hundred copies of Llama's RMSNorm.
Each function below named ``_code_of_...`` is such a layer's forward, statement by statement. It is only compared, never
called. A module whose class has a forward of exactly that code gets the rule below it; any other module goes through the
autograd graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.nodes import has_packed_tensors
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.capture.records import Call
from torch_secorder.per_sample import Outer, at_least_float32, sum_over
from torch_secorder.rules.registry import Gradients, register_forward


def _code_of_conv1d(self: Any, x: Any) -> Any:  # GPT-2
    size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005  # the code is compared as it is written there
    x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
    x = x.view(size_out)
    return x  # noqa: RET504


@register_forward(_code_of_conv1d, parameters=("weight", "bias"))
def conv1d(module: Any, call: Call) -> Gradients:
    """``y = x W + b``: a Linear whose weight is transposed."""
    x, g = call.argument(0, "x"), call.grad_output
    x, g = (value[:, None].flatten(2, -2) if value.dim() > 2 else value[:, None, None] for value in (x, g))
    return {"weight": Outer(g, x, module.weight.shape), "bias": sum_over(g, (1, 2))}


def _code_of_llamas_rms_norm(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _code_of_olmos_rms_norm(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _code_of_t5s_layer_norm(self: Any, hidden_states: Any) -> Any:
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


@register_forward(*(_code_of_llamas_rms_norm, _code_of_olmos_rms_norm, _code_of_t5s_layer_norm), parameters=("weight",))
def rms_norm(module: Any, call: Call) -> Gradients:
    """The root mean square of the last axis, taken in float32; the three differ in where they round to half precision."""
    g, normalized = call.grad_output, _kept(module, call)
    if normalized is None:
        wide: Tensor = call.argument(0, "hidden_states").to(torch.float32)
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    product = at_least_float32(g) * at_least_float32(normalized)
    return {"weight": product.reshape(len(g), -1, g.shape[-1]).sum(1)}


def _kept(module: Any, call: Call) -> Tensor | None:
    """The normalized input that the running product with the weight saved; autograd takes it for a constant."""
    node = call.node
    if torch.is_grad_enabled() or node is None or node.name() != "MulBackward0":
        return None
    # Tensors that saved-tensor hooks keep may be fetched only once.
    if not knows(node.name(), "right") or has_packed_tensors(node) is not False:
        return None
    if getattr(node.next_functions[0][0], "variable", None) is not module.weight:  # a product of a hook's
        return None
    normalized: Tensor | None = saved(node, "right")
    return normalized if normalized is not None and normalized.shape == call.grad_output.shape else None
