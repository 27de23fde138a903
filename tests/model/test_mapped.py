"""Tensors in files: what they hold, that they leave nothing, and what a full disk says."""

import os
from pathlib import Path

import pytest
import torch

from treeq_export.errors import OutputError
from treeq_export.model.mapped import make_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 4), (2, 0)])
def test_a_mapped_tensor_is_a_tensor(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path):
    made = make_tensor(shape, dtype, tmp_path / "new")
    assert (tuple(made.shape), made.dtype) == (shape, dtype)
    made.fill_(1)
    assert bool((made == torch.ones(shape, dtype=dtype)).all())
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "new"])


def test_two_of_them_share_nothing_and_memory_is_an_option(tmp_path: Path):
    one, other = (make_tensor((4,), torch.float32, tmp_path) for _ in range(2))
    one.fill_(1)
    other.fill_(2)
    assert one.sum() == 4
    assert make_tensor((4,), torch.float32, None).shape == (4,)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match=r"no file of 4\.0 GB .* \(No space left") as caught:
        make_tensor((1000, 1000, 1000), torch.float32, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
