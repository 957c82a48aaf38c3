"""``python -m torch_secorder`` is the command ``torch-secorder``."""

import sys

from torch_secorder.cli import main

if __name__ == "__main__":
    sys.exit(main())
