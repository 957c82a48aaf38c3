"""What a block has seen so far, so that a report without samples can say which step is missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class History:
    """Counts of what happened in a monitor's blocks.

    Attributes:
        model: the class of the watched model, for messages.
        every: the first of this many calls of the model is recorded.
        blocks: how many blocks were entered.
        forwards: how many recorded calls of the model returned an output that can be differentiated.
        without_gradient: how many returned none.
        without_samples: how many calls of the model had an empty batch.
        other_passes: how many backward passes computed no gradient of an analyzed parameter.
        late_passes: how many backward passes reached the model's outputs after the block had ended.
        refused: how many backward passes were refused.
        refusal: the latest refusal's text.
        since: words that say from when on things are counted; empty for "from the beginning".
    """

    model: str
    every: int = 1
    blocks: int = 0
    forwards: int = 0
    without_gradient: int = 0
    without_samples: int = 0
    other_passes: int = 0
    late_passes: int = 0
    refused: int = 0
    refusal: str = ""
    since: str = ""

    def refuse(self, error: Exception) -> None:
        """Note that a backward pass was refused."""
        self.refused, self.refusal = self.refused + 1, str(error).split("\n")[0][:300]

    def forget_passes(self) -> None:
        """Forget everything but the number of blocks, since one may be active."""
        for name in ("forwards", "without_gradient", "without_samples", "other_passes", "late_passes", "refused"):
            setattr(self, name, 0)
        self.since = " since reset()"

    def why_empty(self) -> str:
        """Why no sample was seen, and what to do."""
        if self.refused:
            passes = _times(self.refused, "backward pass was", "backward passes were")
            return f"{passes} refused, the last because: {self.refusal}"
        if not self.blocks:
            return (
                "the block was never entered: call the model, and backward() on its loss, inside of the with statement"
            )
        if not self.forwards + self.without_gradient:
            if self.without_samples:
                calls = _times(self.without_samples, "call", "calls")
                return f"{calls} of {self.model} had an empty batch, and no other{self.since}"
            return (
                f"the block was entered, but no call of this {self.model} was completed inside it{self.since}; if a copy of the "
                "model is trained, or only a part of it is called, watch the module that is called"
            )
        return self._why_no_pass()

    def _why_no_pass(self) -> str:
        """The reason why no sample was seen although the model was called."""
        calls = _times(self.forwards + self.without_gradient, "time", "times")
        ran = f"the forward of {self.model} ran {calls}{self.since}"
        if self.every > 1:
            ran += f" (without the calls that every={self.every} passes over)"
        if not self.forwards:
            return (
                f"{ran}, but no output of it can be differentiated: call the model outside of torch.no_grad() and "
                "torch.inference_mode(), and return its outputs without detach()"
            )
        if self.other_passes:
            passes = _times(self.other_passes, "backward pass", "backward passes")
            return (
                f"{ran}, and {passes} computed no gradient of an analyzed parameter, as torch.autograd.grad of inputs does: "
                "call backward() on the loss, or ask torch.autograd.grad for the parameters too"
            )
        if self.late_passes:
            return f"{ran}, but backward came after the block had ended: call loss.backward() inside the block"
        return (
            f"{ran}, but no backward pass reached its outputs: call loss.backward() inside the block, for a loss that is "
            "computed from these outputs without detach()"
        )


def _times(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"
