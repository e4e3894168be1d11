"""`python -m falconlib` is `falconlib`."""

import sys

from falconlib.cli import main

sys.exit(main())
