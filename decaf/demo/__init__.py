"""Synthetic scenes with ground truth, and tiny models trained on them, so that the whole method runs offline."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "bundled"
"""Stands for a bundled model where the path of a model is expected."""

MODELS = Path(__file__).parent / "models"
MLLM_FOLDER = MODELS / "mllm"
SAM2_FILE = MODELS / "sam2.safetensors"
