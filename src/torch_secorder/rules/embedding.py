"""Look-up tables."""

from __future__ import annotations

from torch import nn

from torch_secorder.capture.records import Call
from torch_secorder.errors import CoupledSamplesError, CurvatureError, ShapeError
from torch_secorder.per_sample import RowSparse
from torch_secorder.rules.registry import Gradients, register_refusal, register_rule


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, call: Call) -> Gradients:
    """Rows of a table; the padding row gets no gradient."""
    ids, g = call.argument(0, "input"), call.grad_output
    if not ids.dim():
        raise ShapeError("an Embedding got a single id, without a batch axis")
    if module.padding_idx is not None:
        g = g.masked_fill((ids == module.padding_idx)[..., None], 0)
    ids = ids.reshape(len(ids), -1)
    return {"weight": RowSparse(ids, g.reshape(*ids.shape, g.shape[-1]), module.weight.shape)}


@register_refusal(nn.Embedding, nn.EmbeddingBag)
def table(module: nn.Embedding | nn.EmbeddingBag) -> CurvatureError | None:
    """Whether the batch's frequencies of ids enter the gradient."""
    if module.scale_grad_by_freq:
        return CoupledSamplesError(
            "scale_grad_by_freq=True divides gradients by how often an id occurs in the whole batch, which couples the "
            "samples: set it to False for the analysis"
        )
    return None
