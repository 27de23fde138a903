"""The prepared files of a search: inputs, clean and noisy outputs, quantized weights.

Written once into `search/` of the run folder and read from there, block by block and through the
page cache, so that memory does not grow with the network. Until it is written it lies in mapped
files, so that outputs and gradients of all blocks take twice as much disk:

    rows.safetensors             the network's inputs, and `prediction`, its clean answer
    final.safetensors            other ones, that finalists are compared on
    blocks/<b>.safetensors       clean.<e>, noisy.<e>: element e of the output of block b
    probes/<b>.safetensors       <e>: gradients (rows, K, ...) of K random directions of the
                                 prediction by element e of the output of block b
    weights/<layer>.safetensors  branch.R, branch.L, and w<bits>a<bits>.<tensor> for every pair
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from treeq_export.errors import PlanError
from treeq_export.model.replay import Output
from treeq_export.model.trajectories import Rows
from treeq_export.progress import Say, say_nothing
from treeq_export.reading import load_safetensors
from treeq_export.sealed import read_sealed_metadata, write_sealed_tensors

ROWS_FILE, FINAL_FILE = "rows.safetensors", "final.safetensors"
BLOCK_FILE, PROBE_FILE = "blocks/{}.safetensors", "probes/{}.safetensors"  # number of the block
WEIGHT_FILE = "weights/{}.safetensors"  # name of the layer
CLEAN, NOISY, BRANCH = "clean.", "noisy.", "branch."  # what names of tensors begin with
_REDO = "Remove the folder `search` of the run; the search then starts again."
_PREDICTION = "prediction"
_NUM_ELEMENTS = "num_elements"


@dataclass(frozen=True)
class Store:
    """The files of one search.

    Attributes:
        folder: `search/` of the run folder.
        fingerprint: Digest of everything that the files depend on; others are made anew.
        say: Told in one line that a file is damaged.
    """

    folder: Path
    fingerprint: str
    say: Say = say_nothing

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file, atomically."""
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        write_sealed_tensors(self.folder / name, save_file, contiguous, self.fingerprint)

    def has(self, name: str) -> bool:
        """Whether a file of this search exists and is whole; reads all of it."""
        found = read_sealed_metadata(self.folder / name, self.fingerprint, self.say)
        return found is not None

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file; their bytes are read when they are used."""
        path = self.folder / name
        return load_safetensors(path, error=PlanError, remedy=_REDO, framework="pt")

    def save_rows(self, name: str, rows: Rows, prediction: Tensor) -> None:
        """Write the network's inputs and its clean prediction."""
        self.save(name, {**rows, _PREDICTION: prediction})

    def load_rows(self, name: str = ROWS_FILE) -> tuple[Rows, Tensor]:
        """Return the network's inputs and its clean prediction."""
        tensors = self.load(name)
        prediction = tensors.pop(_PREDICTION)
        return tensors, prediction

    def save_outputs(self, name: str, outputs: Mapping[str, Output]) -> None:
        """Write outputs of one block over all rows, by what their tensors' names begin with."""
        (count, *_) = (len(output) for output in outputs.values())
        tensors = {_NUM_ELEMENTS: torch.tensor(count)}
        for prefix, output in outputs.items():
            tensors |= {f"{prefix}{at}": x for at, x in enumerate(output) if x is not None}
        self.save(name, tensors)

    def load_outputs(self, name: str, prefix: str = "") -> Output:
        """Return an output of a block over all rows: CLEAN, NOISY, or the gradients ("")."""
        tensors = self.load(name)
        count = int(tensors[_NUM_ELEMENTS])
        return tuple(tensors.get(f"{prefix}{at}") for at in range(count))


def pair_prefix(weight_bits: int, activation_bits: int | None) -> str:
    """Return what the tensors of a pair of widths begin with in a layer's file."""
    return f"w{weight_bits}a{activation_bits}."


def slice_rows(rows: Rows, start: int, size: int) -> Rows:
    """Return `size` rows from `start` on."""
    return {name: tensor[start : start + size] for name, tensor in rows.items()}


def slice_output(output: Output, start: int, size: int) -> Output:
    """Return `size` rows of a block's output from `start` on."""
    return tuple(None if x is None else x[start : start + size] for x in output)
