"""The checks are those of the package benchmarks, which lies beside this folder's parent and is not installed."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    # At the end: the repository root also has a folder named like a module of ComfyUI.
    sys.path.append(ROOT)
