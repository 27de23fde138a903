"""Tests that need a CUDA GPU; TREEQ_REQUIRE=gpu turns their skip into a failure."""

import pytest
import torch

from tests.required import skip_or_fail


@pytest.fixture(scope="session", autouse=True)
def needs_gpu() -> None:
    """Skip where there is no GPU."""
    if not torch.cuda.is_available():
        skip_or_fail("gpu", "needs a CUDA GPU, and PyTorch sees none")
