"""`python -m decaf` is the command `decaf`."""

import sys

from .command.main import main

sys.exit(main())
