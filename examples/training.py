"""Watch the curvature while a model trains, with gradients accumulated over four small batches.

Each loss is divided by the number of batches that share a step. `loss_scale` says so, and the numbers are those of
the undivided loss. Training itself is the same as without the monitor.
"""

import torch
from torch import nn

from torch_secorder import FisherMonitor

ACCUMULATE = 4

torch.manual_seed(0)
inputs = torch.randn(512, 20)
targets = (inputs[:, :3].prod(1) + 0.5 * inputs[:, 3] > 0).long()
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
monitor = FisherMonitor(model, loss_scale=1 / ACCUMULATE)

for epoch in range(1, 41):
    monitor.reset()
    with monitor:
        for step, rows in enumerate(torch.randperm(512).split(32), start=1):
            loss = loss_fn(model(inputs[rows]), targets[rows])
            (loss / ACCUMULATE).backward()
            if step % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
    if epoch in (1, 5, 10, 20, 40):
        shares = monitor.report(by="module")["fisher_trace_share"]
        layers = ", ".join(f"layer {layer} {share:.0%}" for layer, share in shares.items())
        print(f"epoch {epoch:2}   loss {loss:.3f}   Fisher trace {monitor.trace:7.3f}   {layers}")
