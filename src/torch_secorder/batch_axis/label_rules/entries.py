"""Labels through functions of single entries, and through those that compute along an axis or sum over it."""

from __future__ import annotations

import numpy as np

from torch_secorder.batch_axis.label_rules.registry import Answer, At, Shape, backward, rule
from torch_secorder.batch_axis.labels import joined_along

# Each entry of an input's gradient comes from the same entry of the output's, before the sum over what was broadcast.
_BY_ENTRIES = (
    "Add Sub Rsub Mul Div Neg Abs Exp Expm1 Exp2 Log Log1P Log2 Log10 Sqrt Rsqrt Reciprocal Pow Sin Cos Tan Tanh Sigmoid "
    "Silu Gelu Relu Relu6 Elu Celu Selu LeakyRelu Hardtanh Hardswish Hardsigmoid Mish Softplus LogSigmoid Threshold Erf Erfc "
    "Clamp ClampMin ClampMax Where MaskedFill Maximum Minimum Lerp Addcmul Addcdiv NativeDropout Clone ToCopy Alias Expand Sign "
    "Logaddexp Atan Atan2 Sinh Cosh Complex Polar Conj Tril Triu IndexFill Fmod Remainder"
)
_BY_ENTRIES_ONCE = (
    "Acos Acosh Angle Asin Asinh Atanh Ceil Copysign Deg2Rad Digamma Erfinv FakeQuantizePerChannelAffineCachemask "
    "FakeQuantizePerTensorAffineCachemask Floor Fmax Fmin Frac Hardshrink Hypot I0 Ldexp Lgamma Logaddexp2 Logit NanToNum "
    "Rad2Deg Round RreluWithNoise Sgn Sinc Softshrink SpecialEntr SpecialI0E SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri "
    "Trunc Xlogy"
)


@rule(*backward(_BY_ENTRIES), *backward(_BY_ENTRIES_ONCE, [0]), "ScatterBackward1", "torch::autograd::CopyBackwards")
def _entries(at: At) -> Answer:
    whole = at.shapes[0]
    return [at.first if shape is None or shape == whole or _broadcasts(shape, whole) else None for shape in at.inputs]


def _broadcasts(shape: Shape, to: Shape) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


@rule(*backward("Sum Mean", [1]), *backward("Var Std LinalgVectorNorm Logsumexp Amax Amin", [0]), reads=("axes",))
def _reduced(at: At) -> Answer | None:
    shape = at.inputs[0]
    if shape is None or at.first.ndim == len(shape):
        return [at.first]
    axes = at.axes(shape)
    return [np.expand_dims(at.first, tuple(axes))] if at.first.ndim + len(axes) == len(shape) else None


@rule(*backward("Max Min Kthvalue", [0]), "MedianBackward1", reads=("axis",))
def _chosen(at: At) -> Answer | None:
    shape = at.inputs[0]
    if not shape or at.first.ndim == len(shape):
        return [at.first]
    return [np.expand_dims(at.first, at.axis(shape))]


@rule(*backward("Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Cummax Cummin Logcumsumexp", [0]), reads=("axis",))
def _along_axis(at: At) -> Answer | None:
    return [joined_along(at.first, [at.axis(at.shapes[0])])] if at.shapes[0] else None
