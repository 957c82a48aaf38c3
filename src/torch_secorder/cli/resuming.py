"""A run that saves its statistics to a file after every few batches and can be resumed from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.autograd.random_state import random_state, set_random_state
from torch_secorder.cli.failures import CommandError
from torch_secorder.model.containers import tensors
from torch_secorder.results.results import Results
from torch_secorder.results.saving import load, save


class Journal:
    """The state of a run: how many batches of which data were counted, under which options, and the random states.

    The file is like one of :meth:`FisherMonitor.save`, with additions by which a later run makes sure that it continues the same
    run: digests of the model and of the counted batches, and the states of the random generators.

    Args:
        path: the file.
        every: the file is written after this many batches each; None to write it only at the end.
        model: the analyzed model.
        options: the options that must be the same in a later run.
        generator: the generator that draws labels.

    Attributes:
        batches: how many batches the data has given so far.
        saved: how many batches are in the file.
    """

    def __init__(
        self, path: Path, every: int | None, model: nn.Module, options: Mapping[str, Any], generator: torch.Generator
    ):
        self.path, self._every, self._generator = path, every, generator
        self._model, self._options = _of_model(model), dict(options)
        self._data = hashlib.blake2b(digest_size=16)
        self._random: list[Tensor] = []
        self._skip, self._expected = 0, ""
        self.batches = 0
        self.saved = 0

    def resumed(self) -> Results:
        """The results that the file's run had counted.

        Raises:
            CommandError: if the file is not of a run like this one.
            ArgumentError: if it is torn or foreign.
        """
        results, state = Results.load(self.path), load(self.path)
        facts = state.get("run")
        if facts is None:
            raise CommandError(
                f"{self.path} doesn't say where a run was: torch-secorder report --save did not write it"
            )
        for option, value in self._options.items():
            if facts["options"].get(option) != value:
                raise CommandError(
                    f"{self.path} is of a run with --{option.replace('_', '-')} {facts['options'].get(option)}, not {value}: "
                    "go on with the same options, or save to another file"
                )
        if facts["model"] != self._model:
            raise CommandError(
                f"{self.path} is of a model with other weights: SETUP must build the same model every time (pass --seed, "
                "or load its weights from a file)"
            )
        self._skip, self._expected = int(facts["batches"]), str(facts["data"])
        self._random = state["random"]
        self._generator.set_state(state["generator"])
        self.saved = self._skip
        return results

    def rest(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that are not counted yet.

        Raises:
            CommandError: if the skipped batches are not those that were counted.
        """
        for batch in batches:
            self.batches += 1
            _digest(self._data, batch)
            if self.batches > self._skip:
                yield batch
            elif self.batches == self._skip:
                self._arrived()
        if self.batches < self._skip:
            raise CommandError(f"{self.path} has counted {self._skip} batches, but the data end after {self.batches}")

    def count(self, results: Results) -> None:
        """Note that a batch was counted, and write the file if it is due."""
        if self._every is not None and self.batches % self._every == 0:
            self.save(results)

    def save(self, results: Results) -> None:
        """Write the file again, as a whole or not at all."""
        if self.saved == self.batches:
            return
        counted = {"batches": self.batches, "data": self._data.hexdigest()}
        facts = {"model": self._model, "options": self._options} | counted
        try:
            drawn = {"generator": self._generator.get_state(), "random": random_state()}
            save(results.state_dict() | {"run": facts} | drawn, self.path)
        except OSError as error:
            raise CommandError(f"cannot write {self.path}: {error.strerror}") from error
        self.saved = self.batches

    def _arrived(self) -> None:
        if self._data.hexdigest() != self._expected:
            raise CommandError(
                f"{self.path} has counted {self._skip} batches, but these are others: the data must come in the same order "
                "every time (shuffle=False, or pass --seed)"
            )
        set_random_state(self._random)


def _of_model(model: nn.Module) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode())
        _digest(found, tensor)
    return found.hexdigest()


def _digest(found: Any, value: Any) -> None:
    for tensor in tensors(value):
        x = tensor.detach().cpu()
        found.update(f"{x.dtype} {tuple(x.shape)}".encode())
        found.update(x.to_dense().contiguous().flatten().view(torch.uint8).numpy().data)
