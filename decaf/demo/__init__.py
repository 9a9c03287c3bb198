"""Synthetic scenes with truth, and tiny models trained on them, so that the whole method can be seen to work offline."""
