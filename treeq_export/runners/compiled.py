"""Where compiled graphs lie in a run folder, what their metadata says, and who runs them.

A compiled target may be run in two ways, each of which is validated and timed:

    ort         `treeq` ops in our custom-op library
    ort_body    the same file without it: ONNX Runtime takes the function bodies

The targets of TensorRT are validated on the CPU: ONNX Runtime runs their Q/DQ nodes and function
bodies. That shows what the graph says, not what an engine does. Products of `tensorrt-native` are
INT8 by INT8, as TensorRT wants them; where ONNX Runtime would saturate them, its sessions are told
not to turn activations into UINT8.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import onnx_ir as ir

from treeq_export.errors import PlanError
from treeq_export.reading import parse_record
from treeq_export.records.build import ShapeRange
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.runners.graph_file import path_of, read_graph
from treeq_export.runners.model_files import MODEL_FILE as MODEL_FILE
from treeq_export.runners.model_files import model_files
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.products import products_saturate

PACKED = "ort"
TENSORRT, TENSORRT_NATIVE = "tensorrt", "tensorrt-native"
TENSORRT_TARGETS = (TENSORRT, TENSORRT_NATIVE)
_BODY = "_body"
_FOLD_BELOW_BYTES = 100_000_000
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
        size: How many they are; 0 is all.
    """

    name: str
    input: str
    output: str
    node: str = ""
    offset: int = 0
    size: int = 0


def model_path(run: Path, target: str) -> Path:
    """Return DIR/onnx/<target>/model.onnx, the same for both ways to run it."""
    return run / "onnx" / target.removesuffix(_BODY) / MODEL_FILE


def uses_kernels(target: str) -> bool:
    """Whether our kernels run a target's `treeq` ops."""
    return target == PACKED and find_library(ORT_LIBRARY) is not None


def ways_to_run(targets: Sequence[str]) -> list[str]:
    """Return targets with "ort_body" behind "ort", where our library is there to be left out.

    Args:
        targets: Compiled targets.
    """
    both = [PACKED, PACKED + _BODY] if uses_kernels(PACKED) else [PACKED]
    return [way for target in targets for way in (both if target == PACKED else [target])]


def runner_options(path: Path, target: str) -> dict[str, bool]:
    """Return the options of OrtRunner for a compiled target.

    Args:
        path: Its model file.
        target: As `ways_to_run` names it.

    Returns:
        use_kernels, fold_constants and keep_int8. Constants are folded but for a packed model of
        more than 100 MB that runs without our kernels.
    """
    kernels = uses_kernels(target)
    packed = target.removesuffix(_BODY) in (PACKED, TENSORRT)
    small = sum(file.stat().st_size for file in model_files(path)) < _FOLD_BELOW_BYTES
    return {
        "use_kernels": kernels,
        "fold_constants": kernels or not packed or small,
        "keep_int8": must_keep_int8(target),
    }


def must_keep_int8(target: str) -> bool:
    """Whether ONNX Runtime would compute a target's sums wrong here with UINT8 activations."""
    return target == TENSORRT_NATIVE and products_saturate()


def open_target(run: Path, target: str, *, threads: int | None = None) -> OrtRunner:
    """Return the runner of a compiled target.

    Args:
        run: The run folder.
        target: As `ways_to_run` names it.
        threads: Threads inside an operator; None lets ONNX Runtime choose.
    """
    path = model_path(run, target)
    return OrtRunner(path, threads=threads, **runner_options(path, target))


def load_compiled(run: Path, target: str) -> ir.Model:
    """Read a compiled graph; its weights are mapped, not copied.

    Raises:
        PlanError: The target has not been compiled, or its file is damaged.
    """
    path = model_path(run, target)
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export compile --run {run}` first.")
    return read_graph(
        path, error=PlanError, remedy=f"Run `treeq-export compile --run {run}` again."
    )


def load_layers(run: Path, target: str, names: Collection[str]) -> tuple[ir.Model, list[LayerSite]]:
    """Read a compiled graph and its list of layers, and check that both fit together.

    Args:
        run: The run folder.
        target: As `ways_to_run` names it.
        names: The plan's layers.

    Raises:
        PlanError: As `load_compiled`, or the graph was compiled from another plan's layers.
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
