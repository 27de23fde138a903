"""The state of a training in progress: one safetensors file, with the progress in its header.

One file, because two could not be replaced at the same instant. It is removed when training ends.
"""

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file

from treeq_export.errors import PlanError
from treeq_export.finetune.training import Progress, Training
from treeq_export.progress import Say, say_nothing
from treeq_export.reading import load_safetensors
from treeq_export.sealed import read_sealed_metadata, write_sealed_tensors


def save_state(path: Path, training: Training, fingerprint: str, seconds: float) -> None:
    """Write the state of a training, atomically.

    Args:
        path: The state file.
        training: The training.
        fingerprint: Digest of all that it depends on.
        seconds: Time spent so far.

    Raises:
        OutputError: The disk is full or the folder cannot be written to.
    """
    tensors = {name: tensor.contiguous() for name, tensor in training.state().items()}
    progress = json.dumps(dataclasses.asdict(training.progress))
    write_sealed_tensors(
        path, save_file, tensors, fingerprint, progress=progress, seconds=repr(seconds)
    )


def load_state(path: Path, training: Training, fingerprint: str, say: Say = say_nothing) -> float:
    """Bring a training to the state that was saved, if it is of the same training.

    Args:
        path: The state file; it may be missing.
        training: The training, at its start.
        fingerprint: Digest of all that it depends on.
        say: Told in one line that the file is damaged; training then starts anew.

    Returns:
        The seconds spent before; 0 where nothing was taken up.
    """
    header = read_sealed_metadata(path, fingerprint, say)
    if header is None:
        return 0.0
    tensors = load_safetensors(path, error=PlanError, remedy="", framework="pt")
    training.load_state(tensors, Progress(**json.loads(header["progress"])))
    return float(header["seconds"])
