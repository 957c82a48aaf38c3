"""``python -m torch_secorder.cli``."""

import sys

from torch_secorder.cli import main

sys.exit(main())
