"""Watch the curvature and the noise of every layer in TensorBoard while a model trains.

Every tenth step runs under a monitor, the others run as if there were none. Then: tensorboard --logdir runs
"""

import argparse

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from torch_secorder import FisherMonitor
from torch_secorder.noise_scale import gradient_noise_scale

EVERY = 10
DECAY = 0.9  # of earlier steps in the noise scale, whose two parts scatter from step to step

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--logdir", default="runs/watch_training", help="where TensorBoard looks")
options = parser.parse_args()

torch.manual_seed(0)
inputs = torch.randn(2048, 20)
targets = (inputs[:, :3].prod(1) + 0.5 * inputs[:, 3] > 0).long()
body = nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()
model = nn.Sequential(*body, nn.Linear(64, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
monitor = FisherMonitor(model)
signal = noise = 0.0

print("  step    loss   Fisher trace ± stderr   noise scale")
with SummaryWriter(options.logdir) as writer:
    for step in range(201):
        rows = torch.randint(2048, (128,))
        optimizer.zero_grad()
        if step % EVERY:
            loss_fn(model(inputs[rows]), targets[rows]).backward()
        else:
            monitor.reset()
            with monitor:
                loss = loss_fn(model(inputs[rows]), targets[rows])
                loss.backward()

            total = monitor.report(by=lambda name: "model").loc["model"]
            parts = gradient_noise_scale(monitor.report(), by="model").loc["model"]
            signal = DECAY * signal + parts["true_grad_sq_norm"]
            noise = DECAY * noise + parts["noise_trace"]
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("fisher_trace", total["fisher_trace"], step)
            writer.add_scalar("noise_scale", noise / signal, step)
            for layer, trace in monitor.report(by="module")["fisher_trace"].items():
                writer.add_scalar(f"fisher_trace/layer {layer}", trace, step)
            if step % 40 == 0:
                trace, stderr = total["fisher_trace"], total["fisher_trace_stderr"]
                errors = f"{trace:14.3f} ± {stderr:.3f}"
                print(f"{step:6} {loss:7.3f} {errors} {noise / signal:13.0f}")
        optimizer.step()
print(f"\nWritten to {options.logdir}. Look at it with: tensorboard --logdir {options.logdir}")
