"""Where compiled graphs lie in a run folder, and what their metadata says."""

import json
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from treeq_export.errors import PlanError

MODEL_FILE = "model.onnx"
LAYERS_KEY = "treeq.layers"


class LayerSite(NamedTuple):
    """Where a quantized layer begins and ends in a graph.

    Attributes:
        name: The layer.
        input: Name of the value that it reads.
        output: Name of the value that it writes, its branch included.
    """

    name: str
    input: str
    output: str


def model_path(run: Path, target: str) -> Path:
    """Return DIR/onnx/<target>/model.onnx."""
    return run / "onnx" / target / MODEL_FILE


def load_compiled(run: Path, target: str) -> ir.Model:
    """Read a compiled graph; its weights are mapped, not copied.

    Raises:
        PlanError: The target has not been compiled.
    """
    path = model_path(run, target)
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export compile --run {run}` first.")
    return ir.load(path)


def write_layers(model: ir.Model, sites: list[LayerSite]) -> None:
    """Put the list of layers into the model's metadata."""
    model.metadata_props[LAYERS_KEY] = json.dumps([site._asdict() for site in sites])


def read_layers(model: ir.Model) -> list[LayerSite]:
    """Return the quantized layers from the model's metadata, in graph order."""
    return [LayerSite(**entry) for entry in json.loads(model.metadata_props.get(LAYERS_KEY, "[]"))]
