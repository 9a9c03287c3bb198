"""Speed and memory of the stages, ours against the plain way, measured side by side in one run."""

import os
import sys
from pathlib import Path

# Random models and the plain way through SAM 2 are the tests' own.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
os.environ["TQDM_DISABLE"] = "1"  # SAM 2's predictor draws a bar for every propagation
