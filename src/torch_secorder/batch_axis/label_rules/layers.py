"""Label rules of layers' nodes: norms, pooling, resizing, recurrent layers and others.

Samples stay where they are in each of these, whatever the numbers are. A node's kind tells which axes it mixes entries along.
"""

from __future__ import annotations

import numpy as np

from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.label_rules.registry import Answer, At, backward, rule
from torch_secorder.batch_axis.labels import Labels, joined, joined_along, put


@rule("ConstantPadNdBackward0", reads=("pads",))
def _padded(at: At) -> Answer | None:
    found, shape = at.first, at.inputs[0]
    if shape is None:
        return None
    for axis, (before, _) in pads(at).items():
        if found.shape[axis] != 1:
            kept = np.arange(max(before, 0), min(at.shapes[0][axis], before + shape[axis]))
            found = put(found.take(kept, axis), axis, kept - before, shape[axis])
    return [found]


def pads(at: At) -> dict[int, tuple[int, int]]:
    """How many entries were put before and behind each axis that was padded; fewer than none where some were cut off."""
    sizes, last = saved(at.node, "pads"), len(at.shapes[0]) - 1
    pairs = {last - place // 2: (sizes[place], sizes[place + 1]) for place in range(0, len(sizes), 2)}
    return {axis: pair for axis, pair in pairs.items() if pair != (0, 0)}


# ------------------------------------------------------------------------------------------------ norms and pooling


@rule(*backward("NativeBatchNorm CudnnBatchNorm", [0]), reads=("training",))
def _batch_norm(at: At) -> Answer:
    """All entries of a channel together, if the statistics are those of the batch; an instance norm has channels of its own."""
    others = [axis for axis in range(at.first.ndim) if axis != 1]
    channels = joined_along(at.first, others)
    own = channels if saved(at.node, "training") else at.first
    return [own, *[channels.reshape(-1)] * (len(at.inputs) - 1)]


@rule("PreluKernelBackward0")
def _prelu(at: At) -> Answer:
    return [at.first, at.first]


def _resized(count: int) -> str:
    """The kinds that mix entries along the last ``count`` axes and change their sizes."""
    kinds = {
        1: "UpsampleLinear UpsampleNearest UpsampleNearestExact ReflectionPad ReplicationPad",
        2: "AdaptiveAvgPool AdaptiveMaxPool AvgPool FractionalMaxPool UpsampleBicubic UpsampleBilinear UpsampleNearest "
        "UpsampleNearestExact ReflectionPad ReplicationPad",
        3: "AdaptiveAvgPool AdaptiveMaxPool AvgPool FractionalMaxPool UpsampleTrilinear UpsampleNearest UpsampleNearestExact "
        "ReflectionPad ReplicationPad",
    }
    more = {1: "", 2: "MaxPool2DWithIndices UpsampleBicubic2DAa UpsampleBilinear2DAa", 3: "MaxPool3DWithIndices"}
    return " ".join([*(f"{kind}{count}D" for kind in kinds[count].split()), more[count]])


@rule(*backward(_resized(1), [0]))
def _resized_along_one(at: At) -> Answer:
    return _mixed_along_last(at, 1)


@rule(*backward(_resized(2), [0]))
def _resized_along_two(at: At) -> Answer:
    return _mixed_along_last(at, 2)


@rule(*backward(_resized(3), [0]), *backward("PixelShuffle PixelUnshuffle ChannelShuffle", [0]))
def _resized_along_three(at: At) -> Answer:
    return _mixed_along_last(at, 3)


@rule(*backward("LinalgCholeskyEx LinalgInvEx LinalgMatrixExp LinalgSolveTriangular", [0]))
def _of_matrices(at: At) -> Answer:
    return _mixed_along_last(at, 2) * len(at.inputs)


def _mixed_along_last(at: At, count: int) -> list[Labels]:
    dims = at.first.ndim
    return [joined_along(at.first, range(max(dims - count, 0), dims))]


@rule(*backward("Im2Col Col2Im GridSampler2D GridSampler3D CudnnGridSampler", [0]))
def _of_images(at: At) -> Answer:
    """Each image by itself. A single one may come without an axis for images."""
    first = joined_along(at.first, range(1, at.first.ndim)).reshape(-1)
    images = {"Im2ColBackward0": 4, "Col2ImBackward0": 3}.get(at.node.name())
    return [
        first.reshape(-1, *[1] * (len(shape) - 1))
        if shape is not None and shape[:1] == at.shapes[0][:1] and images in (None, len(shape))
        else None
        for shape in at.inputs
    ]


# ------------------------------------------------------------------------------------------------ along one axis


@rule("GluBackward0", "ProdBackward1", reads=("axis",))
def _along_axis(at: At) -> Answer | None:
    shape = at.inputs[0]
    if not shape:
        return None
    axis = at.axis(shape)
    return [joined_along(at.first if at.first.ndim == len(shape) else np.expand_dims(at.first, axis), [axis])]


@rule(*backward("FftC2C FftC2R FftR2C", [0]), reads=("axes",))
def _along_axes(at: At) -> Answer | None:
    return [joined_along(at.first, at.axes(at.shapes[0]))] if at.shapes[0] else None


@rule("UnfoldBackward0", reads=("axis",))
def _windows(at: At) -> Answer:
    """Windows along an axis, whose entries are on a new last axis."""
    last = at.first.ndim - 1
    axis = saved(at.node, "axis") % max(last, 1)
    return [joined_along(at.first, [axis, last]).squeeze(last)]


@rule(*backward("MkldnnRnnLayer CudnnRnn", [0]), reads=("batch_sizes",), needs_first=False)
def _recurrent(at: At) -> Answer | None:
    """Recurrent layers, which go along the first axis, or along the second if that is said."""
    shape, name = at.inputs[0], at.node.name()
    if shape is None or len(shape) != 3 or saved(at.node, "batch_sizes"):
        return None
    batch_first = name == "CudnnRnnBackward0" and saved(at.node, "batch_first")
    found = None
    for number, own in enumerate(at.labels):
        if own is not None:
            samples = 0 if batch_first and not number else own.ndim - 2  # A state may have no axis for its layer.
            alone = joined_along(own, [axis for axis in range(own.ndim) if axis != samples]).reshape(-1)
            found = alone if found is None else joined(found, alone)
    assert found is not None
    return [found.reshape(-1, 1, 1) if batch_first else found.reshape(1, -1, 1), *[None] * (len(at.inputs) - 1)]


# ------------------------------------------------------------------------------------------------ products


@rule("TrilinearBackward0")
def _bilinear(at: At) -> Answer:
    rows = joined_along(at.first, range(1, at.first.ndim))
    return [rows if shape is not None and len(shape) == rows.ndim else None for shape in at.inputs]


@rule("MvBackward0", "AddmvBackward0")
def _with_vector(at: At) -> Answer:
    return [*[at.first] * (len(at.inputs) - 2), at.first[:, None], joined_along(at.first, [0])]


@rule("CdistBackward0")
def _distances(at: At) -> Answer:
    last = at.first.ndim - 1
    return [joined_along(at.first, [last]), np.swapaxes(joined_along(at.first, [last - 1]), last, last - 1)]
