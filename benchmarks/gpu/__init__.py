"""What can be known only on a machine with a GPU: each check promises figures that are computed, and measures them.

A check's functions take the machine as an argument. With `machine.on_cpu()` they run at toy sizes, where a counter of tensors stands in for
the card's memory, so that they are known to work before a GPU is at hand (tests/test_gpu_checks.py).
"""
