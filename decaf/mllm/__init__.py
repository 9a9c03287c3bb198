"""Asking a multimodal LLM: finding and loading it, its prompts, its positions, and passes that carry pictures and all questions."""

from .base import MLLM, Encoded, Family, Layout
from .download import download_mllm, find_mllm
from .load import load_mllm
from .supported import all_families, registry

__all__ = ["MLLM", "Encoded", "Family", "Layout", "all_families", "download_mllm", "find_mllm", "load_mllm", "registry"]
