"""Synthetic scenes with truth, and tiny models trained on them, so that the whole method can be seen to work offline."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "bundled"
"""What names a bundled model where the path of one is asked for."""

MODELS = Path(__file__).parent / "models"
MLLM_FOLDER = MODELS / "mllm"
SAM2_FILE = MODELS / "sam2.safetensors"
