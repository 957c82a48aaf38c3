"""Rules: from one call of a layer to the per-sample gradient of each of its parameters.

A rule is one function, ``rule(module, call) -> {local parameter name: per-sample gradient}``, in the file of its layer's
family. Importing this package registers the built-in ones.
"""

from torch_secorder.capture.records import Call
from torch_secorder.rules import (
    bilinear,
    convolution,
    elementwise,
    embedding,
    known_forwards,
    linear,
    nodes,
    normalization,
    recurrent,
)
from torch_secorder.rules.registry import (
    ClassRule,
    Gradients,
    Rule,
    refusal_for,
    register_refusal,
    register_rule,
    rule_for,
)

__all__ = [
    "Call",
    "ClassRule",
    "Gradients",
    "Rule",
    "bilinear",
    "convolution",
    "elementwise",
    "embedding",
    "known_forwards",
    "linear",
    "nodes",
    "normalization",
    "recurrent",
    "refusal_for",
    "register_refusal",
    "register_rule",
    "rule_for",
]
