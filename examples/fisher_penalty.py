"""Train with a penalty on the Fisher trace, and see it bite.

With create_graph=True the exact trace is a part of the loss like any other. Trains a small network on 300 handwritten
digits, with several weights of the penalty, and tells the Fisher trace and what the network makes of 1,497 other
digits. Penalties of this kind are studied by Jastrzebski et al. (2021), "Catastrophic Fisher Explosion".
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from torch_secorder import generalized_fisher_trace

STEPS, BATCH = 200, 50
loss_fn = nn.CrossEntropyLoss()


def digits():
    """300 images to train on and 1,497 to hold out: pixels [n, 64] in 0..1, with their labels."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(pixels[rows], labels[rows]) for rows in (order[:300], order[300:])]


def train(pixels, labels, penalty):
    """A network, trained on the loss plus `penalty` times the exact Fisher trace of each batch; and the largest trace."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    largest = 0.0
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,))
        outputs = model(pixels[rows])
        # No targets: the Fisher averages over the labels that the model predicts.
        trace = generalized_fisher_trace(model, outputs, None, create_graph=True)
        optimizer.zero_grad()
        (loss_fn(outputs, labels[rows]) + penalty * trace).backward()
        optimizer.step()
        largest = max(largest, float(trace.detach()))
    return model, largest


@torch.no_grad()
def quality(model, pixels, labels):
    """The loss, and the accuracy."""
    outputs = model(pixels)
    return float(loss_fn(outputs, labels)), float((outputs.argmax(1) == labels).float().mean())


training, held_out = digits()
print("          Fisher trace          training          held out")
print("penalty   at the end  largest   loss   accuracy   loss   accuracy")
for penalty in (0.0, 0.003, 0.03):
    model, largest = train(*training, penalty)
    trace = float(generalized_fisher_trace(model, model(training[0]), None))
    (loss, accuracy), (loss_held_out, accuracy_held_out) = quality(model, *training), quality(model, *held_out)
    print(f"{penalty:<7}   {trace:10.2f}  {largest:7.1f}   {loss:.3f}  {accuracy:8.1%}", end="   ")
    print(f"{loss_held_out:.3f}  {accuracy_held_out:8.1%}")
