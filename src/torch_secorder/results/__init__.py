"""What was accumulated over samples: sums that merge, tables of them, and files."""

from torch_secorder.results.results import Results

__all__ = ["Results"]
