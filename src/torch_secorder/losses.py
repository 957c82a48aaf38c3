"""Losses that scripts tend to write themselves and that are easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_secorder.arguments import LossMean, require_choice
from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.running.causal import IGNORED, causal_labels
from torch_secorder.running.logits import logits

__all__ = ["causal_lm"]


def causal_lm(per: LossMean = "batch", *, ignore_index: int = IGNORED) -> Callable[[Any, Any], Tensor]:
    r"""The loss of a causal language model, whose logits at one position predict the token at the next.

    With the cross-entropies :math:`e_{n,t}` of sequence n's :math:`T_n` labels, N sequences in the batch:

    ============  ==========================================================  ==============================================
    per           loss                                                        a sample's l_n
    ============  ==========================================================  ==============================================
    "batch"       :math:`\sum_{n,t} e_{n,t} / \sum_n T_n`                     :math:`N \sum_t e_{n,t} / \sum_m T_m`
    "sequence"    :math:`\frac1N \sum_n \frac1{T_n} \sum_t e_{n,t}`           :math:`\frac1{T_n} \sum_t e_{n,t}`
    "sum"         :math:`\sum_{n,t} e_{n,t}`                                  :math:`\sum_t e_{n,t}`, minus its log-likelihood
    ============  ==========================================================  ==============================================

    Under "batch", a sample's share depends on the other sequences of its batch; under "sequence" and "sum" it does not.

    Args:
        per: what is averaged over: "batch" for all labels of the batch, "sequence" for the labels of each sequence and then the
            sequences, "sum" for nothing.
        ignore_index: the label of a position that has none.

    Returns:
        A function of ``(outputs, targets)``. Outputs are logits ``[n, t, c]`` or have them as ``logits``; targets are labels
        ``[n, t]``, the tokens themselves, not shifted; or the whole batch, a mapping with ``labels``, or with ``input_ids`` and
        an ``attention_mask`` that hides the padding.

    Raises:
        ArgumentError: for another ``per``.

    Example:
        >>> import torch
        >>> from torch_secorder.losses import causal_lm
        >>> logits = torch.zeros(2, 4, 8)
        >>> ids = torch.randint(8, (2, 4))
        >>> causal_lm()(logits, ids)  # log 8
        tensor(2.0794)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones(2, 4)}
        >>> causal_lm("sum")(logits, batch)  # 6 log 8
        tensor(12.4766)
    """
    require_choice("per", per, get_args(LossMean))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ArgumentError(f"ignore_index must be an int, not {ignore_index!r}")
    return _CausalLM(per, ignore_index)


@dataclass(frozen=True)
class _CausalLM:
    """See :func:`causal_lm`."""

    per: LossMean
    ignore_index: int

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        predicted = logits(outputs)
        labels = causal_labels(targets, self.ignore_index)
        if not isinstance(labels, Tensor) or predicted.dim() != 3 or labels.shape != predicted.shape[:2]:
            what = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise ShapeError(
                "causal_lm takes logits (samples, positions, classes) and labels (samples, positions), not logits of shape "
                f"{tuple(predicted.shape)} and labels that are {what}"
            )
        predicted, labels = predicted[:, :-1], labels[:, 1:]
        entropies = cross_entropy(
            predicted.flatten(0, 1).to(torch.promote_types(predicted.dtype, torch.float32)),
            labels.flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        )
        counted = labels != self.ignore_index
        if self.per == "sum":
            return entropies.sum()
        if self.per == "batch":
            return entropies.sum() / counted.sum()
        return (entropies.view(labels.shape).sum(1) / counted.sum(1).clamp(min=1)).mean()
