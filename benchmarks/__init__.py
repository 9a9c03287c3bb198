"""Speed and memory of the stages, ours against the plain formula, measured side by side in one run."""
