"""Reading tensors from a PyTorch file without executing anything in it."""

import argparse
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from treeq_export.errors import CheckpointError

_INNER = ("ema", "model")  # of a training checkpoint, the better one first


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict, memory mapped where the file allows it.

    Args:
        path: A `.pt`, `.pth` or `.bin` file: a state dict, or a training checkpoint that holds one
            under "ema" or "model".

    Returns:
        Name to tensor.

    Raises:
        CheckpointError: Truncated, not a PyTorch file, or holding more than tensors.
    """
    try:
        # Training checkpoints of facebookresearch/DiT hold their command line, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(  # noqa: TID251
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch.load raises whatever its parser met
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path}: cannot be read as tensors ({reason}). Download it again, or save only its "
            "state dict."
        ) from error
    for key in _INNER:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(
            f"{path}: received a {type(loaded).__name__} that is no state dict, expected tensors "
            "by name. Save the model's state_dict()."
        )
    return dict(loaded)
