"""Learn a second task without forgetting the first: elastic weight consolidation from the Fisher diagonal.

The first task is to read handwritten digits, the second to read them with their pixels in another order. While the
second is learned, every weight is held at its place by a spring that is as stiff as the Fisher diagonal of the first.
Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks".
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from torch_secorder import FisherMonitor

loss_fn = nn.CrossEntropyLoss()


def train(model, images, labels, penalty=lambda: 0.0, steps=400):
    """Fits the model with Adam, to a loss with a penalty."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (100,))
        optimizer.zero_grad()
        (loss_fn(model(images[rows]), labels[rows]) + penalty()).backward()
        optimizer.step()


# [fisher]
def fisher_diagonal(model, images):
    """The Fisher diagonal per image, of labels drawn from the model's prediction."""
    with FisherMonitor(model, diagonal=True, fisher="sampled") as monitor:
        for batch in images.split(100):
            logits = model(batch)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            loss_fn(logits, labels).backward()
    model.zero_grad()
    return monitor.diagonal


# [penalty]
def springs(model, diagonal, strength):
    """A function for strength / 2 * sum_i F_ii (w_i - w_i*)^2, w* the weights now."""
    parameters = dict(model.named_parameters())
    anchors = {name: p.detach().clone() for name, p in parameters.items()}

    def penalty():
        moved = ((diagonal[name], p - anchors[name]) for name, p in parameters.items())
        return strength / 2 * sum((stiff * move**2).sum() for stiff, move in moved)

    return penalty


# [run]
@torch.no_grad()
def accuracy(model, images, labels):
    """The share of images that the model reads correctly."""
    return (model(images).argmax(1) == labels).float().mean().item()


torch.manual_seed(0)
torch.set_num_threads(1)  # Several threads round sums in other ways, after which another image is right or wrong.
data = load_digits()
images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]
shuffled = images[:, torch.randperm(64)]
first, second = images[:1500], shuffled[:1500]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
train(model, first, labels[:1500])
print(f"First task learned: {accuracy(model, images[1500:], labels[1500:]):.1%} of 297 held-out images are right.\n")
diagonal = fisher_diagonal(model, first)

mean = sum(d.sum() for d in diagonal.values()) / sum(d.numel() for d in diagonal.values())
even = {name: torch.full_like(d, mean) for name, d in diagonal.items()}  # the same trace, spread evenly

print("After the second task          first  second")
for name, stiffness, strength in (
    ("without springs", even, 0),
    ("springs all alike, weak", even, 15),
    ("springs all alike, strong", even, 150),
    ("Fisher diagonal, weak", diagonal, 15),
    ("Fisher diagonal, strong", diagonal, 150),
):
    learner = copy.deepcopy(model)
    train(learner, second, labels[:1500], springs(learner, stiffness, strength))
    scores = [accuracy(learner, x[1500:], labels[1500:]) for x in (images, shuffled)]
    print(f"{name:29} {scores[0]:6.1%}  {scores[1]:6.1%}")
