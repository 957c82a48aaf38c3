"""The pieces, by what is hard about them; importing this package enters all of them."""

from fuzz.pieces import attention, batch_free, convolutions, coupled, ends, layers, order, recurrent, routing, weights

__all__ = [
    "attention",
    "batch_free",
    "convolutions",
    "coupled",
    "ends",
    "layers",
    "order",
    "recurrent",
    "routing",
    "weights",
]
