"""What was accumulated over samples: sums that merge, tables of these sums, and files."""

from torch_secorder.results.results import Results

__all__ = ["Results"]
