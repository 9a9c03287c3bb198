"""J and F against the numbers of the benchmark's own code."""

import torch

from decaf.evaluation.metrics import contour_accuracy, region_similarity

GOLDEN = "metrics"


def test_region_similarity(case):
    actual = region_similarity(case["input.prediction"], case["input.ground_truth"])
    torch.testing.assert_close(actual, case["expected.J"], rtol=0, atol=1e-12)


def test_contour_accuracy(case):
    actual = contour_accuracy(case["input.prediction"], case["input.ground_truth"])
    torch.testing.assert_close(actual, case["expected.F"], rtol=0, atol=1e-12)
