"""Which layers of a digit classifier carry its curvature?

Trains a small convolutional network on the 1,797 images of handwritten digits that come with scikit-learn,
and asks how much Fisher information each of its parameters carries. Writes report.csv and report.png.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from torch_secorder import FisherMonitor, fisher_results

loss_fn = nn.CrossEntropyLoss()


class DigitNet(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, 32)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images):
        """The logits of ten digits, [n, 10]."""
        x = self.norm1(self.conv1(images)).relu()
        x = self.norm2(self.conv2(x)).relu()
        x = self.hidden(x.flatten(1)).relu()
        return self.classifier(x)


def digits():
    """1,500 images to train on and 297 to hold out: pixels [n, 1, 8, 8] in 0..1, with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return random_split(TensorDataset(images, torch.tensor(data.target)), [1500, 297])


def train(model, loader, epochs):
    """Fits the model with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss_fn(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, loader):
    """The share of images that the model reads correctly."""
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return correct / len(loader.dataset)


def analyze(model, loader):
    """A monitor that has watched one forward and backward pass of every batch."""
    with FisherMonitor(model) as monitor:
        for images, labels in loader:
            model.zero_grad()
            loss_fn(model(images), labels).backward()
    return monitor


def picture(layers, n_samples):
    """Horizontal bars: what each layer carries, with its standard error."""
    figure = Figure(figsize=(8, 0.5 * len(layers) + 1.3), layout="constrained")
    axes = figure.subplots()
    trace, stderr = layers["fisher_trace"], layers["fisher_trace_stderr"]
    bars = axes.barh(layers.index, trace, xerr=stderr, height=0.6, capsize=3, color="#7ba7d7")
    labels = [f"{row.fisher_trace_share:.1%} in {row.numel:,} weights" for row in layers.itertuples()]
    axes.bar_label(bars, labels, padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    axes.set_title("Fisher information of a digit classifier, layer by layer", loc="left")
    axes.set_xlabel(f"Fisher trace (mean over {n_samples:,} images, ± standard error)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def conclusions(monitor, exact):
    """What the numbers say, in sentences."""
    report, layers = monitor.report(), monitor.report(by="module")
    first, second = layers.sort_values("fisher_trace", ascending=False).head(2).itertuples()
    largest = layers.loc[layers["numel"].idxmax()]
    squared = report["grad_sq_norm"].sum()
    return [
        f"{first.Index} carries most, {first.fisher_trace:.3f} ± {first.fisher_trace_stderr:.3f};"
        f" then comes {second.Index}, {second.fisher_trace:.3f} ± {second.fisher_trace_stderr:.3f}.",
        f"{largest.name} has {largest.numel / report['numel'].sum():.0%} of the weights"
        f" and {largest.fisher_trace_share:.0%} of the trace.",
        f"The empirical Fisher, {monitor.trace:.2f}, takes the labels of the data, which a trained model finds likely.",
        f"The exact Fisher, {exact.trace:.1f}, averages over all labels that the model predicts.",
        f"Squaring the gradient of each batch gives {squared:.4f}: {monitor.trace / squared:.0f} times too small.",
    ]


def main():
    """Train, analyze, print, and write report.csv and report.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for report.csv and report.png")
    parser.add_argument("--quick", action="store_true", help="train for one epoch only")
    options = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = (DataLoader(part, batch_size=100, shuffle=True) for part in digits())
    model = DigitNet()
    train(model, training, epochs=1 if options.quick else 8)
    print(f"Trained on {len(training.dataset):,} images of handwritten digits.", end=" ")
    print(f"Accuracy on {len(held_out.dataset)} held-out images: {accuracy(model, held_out):.1%}")

    monitor = analyze(model, training)
    print(f"\nEmpirical Fisher, by parameter\n\n{monitor.summary()}")
    exact = fisher_results(model, None, training, fisher="exact", progress=False)
    print(f"\nExact Fisher, by module\n\n{exact.summary(by='module')}\n")
    print(*conclusions(monitor, exact), sep="\n")

    options.out.mkdir(parents=True, exist_ok=True)
    report = monitor.report()
    report.assign(**report.attrs).to_csv(options.out / "report.csv")  # for read_report and torch-secorder compare
    picture(monitor.report(by="module"), monitor.n_samples).savefig(options.out / "report.png", dpi=150)
    print(f"\nWritten to {options.out / 'report.csv'} and {options.out / 'report.png'}.")
    print("Next: docs/quickstart.rst for your own model, examples/quantize_pretrained.py for a decision.")


if __name__ == "__main__":
    main()
