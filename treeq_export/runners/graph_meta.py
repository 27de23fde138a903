"""What the metadata of a compiled graph say: its target, its plan, its layers, its batch sizes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, TypeVar

import onnx_ir as ir

from treeq_export.errors import PlanError
from treeq_export.reading import parse_record
from treeq_export.records.build import ShapeRange
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_file import path_of, read_graph

LAYERS_KEY = "treeq.layers"
TARGET_KEY = "treeq.target"
PLAN_KEY = "treeq.plan_sha256"
# The shapes that an engine is built for, see compile/batch_profile.py.
PROFILE_KEY = "treeq.batch_profile"

T = TypeVar("T")


class LayerSite(NamedTuple):
    """Where a quantized layer begins and ends in a graph.

    Attributes:
        name: The layer.
        input: Name of the value that it reads; "" where it became part of a fused node.
        output: Name of the value that it writes, its branch included; "" as above.
        node: Name of the packed node that computes it; several layers may share one.
        offset: First of its output channels in that node.
        size: Number of them; 0 is all.
    """

    name: str
    input: str
    output: str
    node: str = ""
    offset: int = 0
    size: int = 0


def load_compiled(run: Path, target: str) -> ir.Model:
    """Read a compiled graph; its weights are mapped, not copied.

    Raises:
        PlanError: The target has not been compiled, or its file is damaged.
    """
    path = run / RunFolder.graph(target)
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export compile --run {run}` first.")
    return read_graph(
        path, error=PlanError, remedy=f"Run `treeq-export compile --run {run}` again."
    )


def load_layers(run: Path, target: str, names: Collection[str]) -> tuple[ir.Model, list[LayerSite]]:
    """Read a compiled graph and its list of layers, and check that both fit together.

    Args:
        run: The run folder.
        target: The target, or a way to run it, such as "ort_body".
        names: The plan's layers.

    Raises:
        PlanError: The graph is missing, damaged, or was compiled from another plan's layers.
    """
    model = load_compiled(run, target)
    sites = read_layers(model)
    again = f"Run `treeq-export compile --run {run}` again."
    if {site.name for site in sites} != set(names):
        raise PlanError(
            f"{path_of(model)}: holds {len(sites)} layers, the plan {len(names)}. {again}"
        )
    values = ir.convenience.create_value_mapping(model.graph)
    for site in sites:
        for value in (site.input, site.output):
            if value and value not in values:
                raise PlanError(
                    f"{path_of(model)}: {LAYERS_KEY}: {site.name}: no value {value!r}. {again}"
                )
    return model, sites


def write_layers(model: ir.Model, sites: list[LayerSite]) -> None:
    """Put the list of layers into the model's metadata."""
    model.metadata_props[LAYERS_KEY] = json.dumps([site._asdict() for site in sites])


def read_layers(model: ir.Model) -> list[LayerSite]:
    """Return the quantized layers from the model's metadata, in graph order.

    Raises:
        PlanError: The metadata are malformed.
    """
    text = model.metadata_props.get(LAYERS_KEY, "[]")
    return _parse(model, LAYERS_KEY, text, list[LayerSite])


def read_profile(model: ir.Model) -> dict[str, ShapeRange] | None:
    """Return the shapes by input that an engine is built for; None where the metadata have none.

    Raises:
        PlanError: The metadata are malformed.
    """
    text = model.metadata_props.get(PROFILE_KEY)
    return None if text is None else _parse(model, PROFILE_KEY, text, dict[str, ShapeRange])


def _parse(model: ir.Model, key: str, text: str, kind: type[T]) -> T:
    where = f"{path_of(model)}: {key}"
    return parse_record(
        text, kind, where, error=PlanError, remedy="Run `treeq-export compile` again."
    )
