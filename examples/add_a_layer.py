"""Teach the library a layer of your own, and check the rule against plain autograd.

The layer scales each channel by a learned factor, as ConvNeXt's and many vision transformers' blocks do.
"""

import torch
from torch import nn

from torch_secorder import FisherMonitor, register_rule


# [layer]
class LayerScale(nn.Module):
    """Multiplies every channel, the last axis, by a weight."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        """The scaled input, of the same shape."""
        return x * self.weight


# [rule]
@register_rule(LayerScale)
def layer_scale(module, call):
    """Per-sample gradients of LayerScale, by parameter name."""
    (x,) = call.inputs  # [n, ..., channels], as is call.grad_output
    return {"weight": (x * call.grad_output).flatten(1, -2).sum(1)}  # [n, channels]


# [check]
def autograd_trace(model, loss_fn, inputs, targets):
    """The empirical Fisher trace of each parameter, by one backward pass per sample."""
    traces = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        gradients = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
        for name, gradient in zip(traces, gradients, strict=True):
            traces[name] += gradient.square().sum().item() / len(inputs)
    return traces


def main():
    """Compare the two on sequences: 16 samples of 5 tokens with 8 channels."""
    torch.manual_seed(0)
    body = nn.Linear(8, 8), LayerScale(8), nn.Tanh(), nn.Flatten()
    model = nn.Sequential(*body, nn.Linear(40, 3)).double()
    loss_fn = nn.CrossEntropyLoss()
    inputs, targets = torch.randn(16, 5, 8).double(), torch.randint(3, (16,))

    with FisherMonitor(model) as monitor:
        loss_fn(model(inputs), targets).backward()

    report = monitor.report()[["module_type", "fisher_trace"]]
    report["autograd"] = autograd_trace(model, loss_fn, inputs, targets)
    print(report.to_string())
    torch.testing.assert_close(list(report["fisher_trace"]), list(report["autograd"]))


if __name__ == "__main__":
    main()
