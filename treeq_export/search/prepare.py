"""What every measurement of a search reads: inputs, clean and noisy outputs, quantized weights.

Written once into `search/` of the run folder and read from there, block by block and through the
page cache, so that memory does not grow with the network. Until it is written it lies in mapped
files, so that outputs and gradients of all blocks take twice as much disk:

    rows.safetensors             the network's inputs, and `prediction`, its clean answer
    final.safetensors            other ones, that finalists are compared on
    blocks/<b>.safetensors       clean.<e>, noisy.<e>: element e of the output of block b
    probes/<b>.safetensors       <e>: K gradients of the prediction by element e of block b's output
    weights/<layer>.safetensors  branch.R, branch.L, and w<bits>a<bits>.<tensor> for every pair

Environmental Noise Guidance (the scalar is TreeQ's, this formula is ours): a segment's input is
x + lambda (x_q - x), with x_q what it is when all that lies before is quantized at the budget. The
noisy outputs are those of the network quantized uniformly at the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from treeq_export.errors import PlanError
from treeq_export.model.fit import FloatArray, LayerFitter, clean_tokens
from treeq_export.model.mapped import make_tensor
from treeq_export.model.quantized import linear_of
from treeq_export.model.replay import BlockReplay, Output
from treeq_export.model.sequential import arrays_of
from treeq_export.model.statistics import InputStatistics
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan
from treeq_export.quant.spec import WeightFormat
from treeq_export.reading import load_safetensors
from treeq_export.recipe import Recipe
from treeq_export.sealed import Say, read_sealed_metadata, say_nothing, write_sealed_tensors
from treeq_export.search.formats import make_activation_format

FOLDER = "search"
_REDO = "Remove the folder `search` of the run; the search then starts again."
ROWS_FILE, FINAL_FILE = "rows.safetensors", "final.safetensors"
_PREDICTION = "prediction"
_KEY = "fingerprint"
BRANCH = "branch."
_TOKENS_PER_CHANNEL = 8  # of the calibration tokens, for every pair of widths


@dataclass(frozen=True)
class Store:
    """The files of one search.

    Attributes:
        folder: `search/` of the run folder.
        fingerprint: Of everything that the files depend on; others are made anew.
        say: Told in one line that a file is damaged.
    """

    folder: Path
    fingerprint: str
    say: Say = say_nothing

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file, atomically."""
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        write_sealed_tensors(self.folder / name, save_file, contiguous, {_KEY: self.fingerprint})

    def has(self, name: str) -> bool:
        """Whether a file of this search is there and whole; reads all of it."""
        expected = {_KEY: self.fingerprint}
        return read_sealed_metadata(self.folder / name, expected, self.say) is not None

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file; their bytes are read when they are used."""
        path = self.folder / name
        return load_safetensors(path, error=PlanError, remedy=_REDO, framework="pt")

    def load_rows(self, name: str = ROWS_FILE) -> tuple[Rows, Tensor]:
        """Return the network's inputs and its clean prediction."""
        tensors = self.load(name)
        prediction = tensors.pop(_PREDICTION)
        return tensors, prediction

    def load_block(self, block: int, kind: str) -> Output:
        """Return the output of a block over all rows.

        Args:
            block: Its number.
            kind: "clean" or "noisy".
        """
        tensors = self.load(block_file(block))
        count = int(tensors["num_elements"])
        return tuple(tensors.get(f"{kind}.{element}") for element in range(count))

    def load_probes(self, block: int) -> Output:
        """Return the gradients of a searched block, elements (rows, K, ...)."""
        tensors = self.load(probe_file(block))
        count = int(tensors["num_elements"])
        return tuple(tensors.get(str(element)) for element in range(count))


def block_file(block: int) -> str:
    """Return the name of the file with a block's outputs."""
    return f"blocks/{block}.safetensors"


def probe_file(block: int) -> str:
    """Return the name of the file with the gradients of a block."""
    return f"probes/{block}.safetensors"


def pair_prefix(weight_bits: int, activation_bits: int) -> str:
    """Return what the tensors of a pair of widths begin with in a layer's file."""
    return f"w{weight_bits}a{activation_bits}."


def weight_file(layer: str) -> str:
    """Return the name of the file with a layer's quantized weights."""
    return f"weights/{layer}.safetensors"


def slice_rows(rows: Rows, start: int, size: int) -> Rows:
    """Return `size` rows from `start` on."""
    return {name: tensor[start : start + size] for name, tensor in rows.items()}


def slice_output(output: Output, start: int, size: int) -> Output:
    """Return `size` rows of a block's output from `start` on."""
    return tuple(None if x is None else x[start : start + size] for x in output)


def record_outputs(
    replay: BlockReplay, rows: Rows, batch_rows: int, folder: Path | None = None
) -> tuple[list[Output], Tensor]:
    """Run the whole network and return every block's output and the prediction, over all rows.

    Args:
        replay: The network.
        rows: Its inputs.
        batch_rows: Rows of one forward pass.
        folder: Where files lie that hold the outputs; None holds them in memory.
    """
    blocks: list[Output] = [()] * len(replay.blocks)
    predictions: list[Tensor] = []
    total = len(next(iter(rows.values())))
    for start in range(0, total, batch_rows):

        def keep(block: int, output: Output, start: int = start) -> None:
            if start == 0:
                blocks[block] = make_outputs(output, total, folder)
            for whole, x in zip(blocks[block], output, strict=True):
                if whole is not None and x is not None:
                    whole[start : start + len(x)] = x

        (prediction,) = replay.run(slice_rows(rows, start, batch_rows), on_output=keep)
        assert prediction is not None
        predictions.append(prediction)
    return blocks, torch.cat(predictions)


def make_outputs(output: Output, total: int, folder: Path | None) -> Output:
    """Return tensors for all rows of an output whose first rows are given."""
    return tuple(
        None if x is None else make_tensor((total, *x.shape[1:]), x.dtype, folder) for x in output
    )


def save_rows(store: Store, name: str, rows: Rows, prediction: Tensor) -> None:
    """Write the network's inputs and its clean prediction."""
    store.save(name, {**rows, _PREDICTION: prediction})


def save_blocks(store: Store, clean: Sequence[Output], noisy: Sequence[Output]) -> None:
    """Write the outputs of every block, clean and in the noisy environment."""
    for block, outputs in enumerate(zip(clean, noisy, strict=True)):
        tensors = {"num_elements": torch.tensor(len(outputs[0]))}
        for kind, output in zip(("clean", "noisy"), outputs, strict=True):
            tensors |= {f"{kind}.{element}": x for element, x in enumerate(output) if x is not None}
        store.save(block_file(block), tensors)


def save_probes(store: Store, gradients: Mapping[int, Output]) -> None:
    """Write the gradients of blocks by number."""
    for block, output in gradients.items():
        tensors = {str(element): x for element, x in enumerate(output) if x is not None}
        store.save(probe_file(block), {"num_elements": torch.tensor(len(output)), **tensors})


def fit_weights(
    store: Store,
    denoiser: Denoiser,
    templates: Sequence[LayerPlan],
    statistics: Mapping[str, InputStatistics],
    recipe: Recipe,
    on_step: Callable[[float], None],
) -> None:
    """Quantize every layer to every candidate pair of widths and write the tensors.

    With calibrate.inputs "quantized", a calibrated weight makes up for what its own activation
    quantizer does, so it is another one for every activation width. A search that measured one
    weight with all activations would find low activation bits dearer than they end up.

    Args:
        store: Where to.
        denoiser: The full-precision model.
        templates: One entry per layer to fit, with its branch and rotation.
        statistics: Of every layer's rotated input.
        recipe: The candidates, and how scales and codes are found.
        on_step: Called with the fraction done, 0..1.
    """
    for done, layer in enumerate(templates, start=1):
        linear = linear_of(denoiser, layer)
        fitted = _fit_layer(layer, *arrays_of(linear), statistics[layer.name], recipe)
        store.save(weight_file(layer.name), fitted)
        on_step(done / len(templates))


def _fit_layer(
    layer: LayerPlan,
    weight: FloatArray,
    bias: FloatArray | None,
    statistics: InputStatistics,
    recipe: Recipe,
) -> dict[str, Tensor]:
    section = recipe.search
    calibrate = recipe.calibrate.without_training()
    few = statistics.thin(_TOKENS_PER_CHANNEL * layer.in_features, recipe.seed)
    fitter = LayerFitter(layer, weight, bias, clean_tokens(layer, few), calibrate)
    tensors: dict[str, Tensor] = {}
    for activation_bits in sorted(set(section.activation_candidates)):
        met = fitter.meet(make_activation_format(activation_bits, section.activation_scale))
        for weight_bits in sorted(set(section.weight_candidates)):
            widened = WeightFormat(bits=weight_bits, group_size=layer.weight.group_size)
            for name, value in fitter.fit(met, widened).tensors.items():
                own = "" if name.startswith(BRANCH) else pair_prefix(weight_bits, activation_bits)
                tensors[own + name] = torch.from_numpy(np.ascontiguousarray(value))
    return tensors
