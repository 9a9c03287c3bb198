"""Multimodal LLMs: find a model, load it, ask it. A family joins by adding one file to `families`."""

from .base import MLLM, Family, Visual
from .load import find_mllm, load_mllm, registry

__all__ = ["MLLM", "Family", "Visual", "find_mllm", "load_mllm", "registry"]
