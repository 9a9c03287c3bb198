"""`python -m decaf` is the command `decaf`."""

import sys

from .cli import main

sys.exit(main())
