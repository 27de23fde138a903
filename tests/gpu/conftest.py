"""Tests that need a CUDA GPU; TREEQ_REQUIRE=gpu turns their skip into a failure."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def needs_gpu() -> None:
    """Skip where there is no GPU."""
    if torch.cuda.is_available():
        return
    if "gpu" in os.environ.get("TREEQ_REQUIRE", "").split(","):
        pytest.fail("TREEQ_REQUIRE asks for a GPU, and PyTorch sees none")
    pytest.skip("needs a CUDA GPU")
