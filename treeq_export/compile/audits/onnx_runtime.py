"""The audit: what did each quantized layer become in the runtime that loads the graph?

ONNX Runtime writes the graph as it would run it. Each layer is found in there by its weight: the
INT8 initializer with the layer's codes, or UINT8 with 128 added, whatever name constant folding
gave it. The node that multiplies it has to be one of the integer operators. A layer whose
activations stay in floating point is also found by the packed codes of MatMulNBits or by its
dequantized weight. Names and counts in the source graph would prove nothing: the runtime may
silently fall back to float.

The `ort` target is audited twice: with our custom-op library every layer has to be left as a packed
node, and without it each kind of function body has to become integer arithmetic as well. One layer
of each kind stands for the others: at the size of DiT-XL/2 ONNX Runtime would need more than 10 GB
to unpack all of them at once.

The targets of TensorRT are audited without a runtime, see compile/audits/tensorrt.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from treeq_export.compile.audits.entry import MISSING, audit_entry, digest_of
from treeq_export.compile.graph.fused import packed_nodes
from treeq_export.compile.passes.clean_metadata import foreign_metadata
from treeq_export.errors import CompileError
from treeq_export.plan import LayerPlan, Plan
from treeq_export.records import AuditLayer
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.runners.graph_file import read_graph
from treeq_export.runners.graph_meta import read_layers
from treeq_export.runners.plain_layer import cut_packed
from treeq_export.scratch import scratch_folder

# Integer matrix products of ONNX Runtime's CPU provider.
INTEGER_OPS = frozenset(
    {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"}
)
_UINT8_ZERO = 128  # the only zero point of UINT8 weights, see `zero_points`
_UINT4_ZERO = 8
_BLOCK_PRODUCT = "MatMulNBits"
_WEIGHT_TYPES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT})
_REMEDY = "Exclude them by search.exclude, or use the ONNX Runtime version of constraints.txt."


@dataclass(frozen=True)
class Audit:
    """How the quantized layers of a written file are found and judged.

    Attributes:
        read: Says what every layer became, from the file, the plan and the plan's tensors.
        where: The place where that was seen, for the error.
        remedy: A remedy for the user, for the error.
    """

    read: Callable[[Path, Plan, Mapping[str, NDArray[Any]]], list[AuditLayer]]
    where: str = f"in ONNX Runtime {onnxruntime.__version__}"
    remedy: str = _REMEDY

    def check(self, target: str, audit: Sequence[AuditLayer]) -> None:
        """Check that every layer with quantized activations became integer arithmetic.

        Raises:
            CompileError: Names the layers that did not, and what they became.
        """
        failed = [entry for entry in audit if not entry.integer and not entry.weight_only]
        if failed:
            listed = ", ".join(f"{entry.name} ({_describe(entry)})" for entry in failed[:8])
            more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
            raise CompileError(
                f"target {target}: {len(failed)} of {len(audit)} quantized layers did not become "
                f"integer arithmetic {self.where}: {listed}{more}. {self.remedy}"
            )


def optimized_graph(path: Path, folder: Path, *, use_kernels: bool = False) -> ir.Model:
    """Return the graph that ONNX Runtime's CPU provider makes of a model.

    Args:
        path: The model.
        folder: The folder of the optimized graph; it has to outlive the result.
        use_kernels: Whether our custom-op library is registered.

    Raises:
        CompileError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    library = find_library(ORT_LIBRARY) if use_kernels else None
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimized.data"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
    )
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CompileError(f"{path}: ONNX Runtime refuses it: {reason}") from error
    return read_graph(folder / "optimized.onnx", error=CompileError, remedy=_REMEDY)


def audit_graph(path: Path, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> list[AuditLayer]:
    """Say what every quantized layer became in ONNX Runtime.

    Args:
        path: The compiled model.
        plan: The plan.
        tensors: The plan's tensors, for the codes.

    Returns:
        One entry per layer, in execution order.

    Raises:
        CompileError: ONNX Runtime refuses the model.
    """
    readers = _find_readers(path)
    return [
        audit_entry(layer, _forms(layer, [layer.name], tensors), readers, INTEGER_OPS)
        for layer in plan.layers
    ]


def audit_packed(path: Path, plan: Plan, tensors: Mapping[str, NDArray[Any]]) -> list[AuditLayer]:
    """Say what every layer of the `ort` target became, with our kernels and without.

    Args:
        path: The compiled model.
        plan: The plan.
        tensors: The plan's tensors, for the codes.

    Returns:
        One entry per layer, in execution order; without our library on this machine, what the
        function bodies became.

    Raises:
        CompileError: ONNX Runtime refuses the model.
    """
    model = read_graph(path, error=CompileError, remedy=_REMEDY)
    sites = read_layers(model)
    nodes = {node.name: node for node in packed_nodes(model)}
    bodies: dict[tuple[str, ...], AuditLayer] = {}
    entries: list[AuditLayer] = []
    for site in sites:
        key = nodes[site.node].op_identifier()
        if key not in bodies:
            names = [other.name for other in sites if other.node == site.node]
            layer = plan.layer(site.name)
            with scratch_folder() as folder:
                alone = folder / "layer.onnx"
                ir.save(cut_packed(model, nodes[site.node], as_functions=True), alone)
                readers = _find_readers(alone)
            forms = _forms(layer, names, tensors)
            bodies[key] = audit_entry(layer, forms, readers, INTEGER_OPS)
        entries.append(bodies[key].model_copy(update={"name": site.name}))
    if find_library(ORT_LIBRARY) is None:
        return entries
    with scratch_folder() as folder:
        optimized = optimized_graph(path, folder, use_kernels=True)
        left = {node.name: f"{node.domain}::{node.op_type}" for node in packed_nodes(optimized)}
    return [
        entry.model_copy(
            update={
                "op_type": left.get(site.node, MISSING),
                "integer": entry.integer and site.node in left,
                "without_kernels": entry.op_type,
            }
        )
        for site, entry in zip(sites, entries, strict=True)
    ]


def _describe(entry: AuditLayer) -> str:
    body = entry.without_kernels
    return entry.op_type if body is None else f"{entry.op_type}, function body: {body}"


def check_metadata(model: ir.Model) -> None:
    """Check that no local path is left in the graph.

    Raises:
        CompileError: A node or value still carries metadata of the exporter.
    """
    for name in foreign_metadata(model):
        raise CompileError(
            f"{name}: carries the exporter's metadata, which holds local paths. "
            "Run the CleanMetadata pass on this target."
        )


def _find_readers(path: Path) -> dict[str, list[str]]:
    """Return the operators that read each possible weight in ONNX Runtime, by its digest."""
    readers: dict[str, list[str]] = {}
    with scratch_folder() as folder:
        for value in optimized_graph(path, folder).graph.initializers.values():
            if value.dtype in _WEIGHT_TYPES and value.const_value is not None:
                for use in value.uses():
                    codes = _read_codes(value.const_value.numpy(), use.node)
                    readers.setdefault(digest_of(codes), []).append(use.node.op_type)
    return readers


def _read_codes(stored: NDArray[Any], reader: ir.Node) -> NDArray[Any]:
    """Return a weight as `_forms` has it, stored for a reader with a zero point or padded."""
    if reader.op_type == _BLOCK_PRODUCT and stored.dtype == np.uint8:
        return stored.reshape(len(stored), -1)[:, : reader.attributes["K"].as_int() // 2]
    if stored.dtype == np.uint8:
        return (stored.astype(np.int16) - _UINT8_ZERO).astype(np.int8)
    return stored


def _forms(
    layer: LayerPlan, names: Sequence[str], tensors: Mapping[str, NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    """Yield how a runtime may store the weight of layers that share a node.

    The codes (K, N), int8. Where activations stay in floating point also the dequantized weight
    (K, N), and MatMulNBits' packing of at most 4 bits: two input channels a byte, the first in its
    low half, plus 8.
    """
    codes, scales = (
        np.concatenate([tensors[f"{name}.{key}"] for name in names])
        for key in ("codes", "weight_scale")
    )
    yield codes.T
    if layer.activation.bits is not None:
        return
    n, k = codes.shape
    groups = codes.reshape(n, scales.shape[1], -1)
    yield (groups * scales[:, :, None]).reshape(n, k).T
    if codes.min() >= -_UINT4_ZERO and codes.max() < _UINT4_ZERO and not k % 2:
        unsigned = (codes + _UINT4_ZERO).astype(np.uint8)
        yield unsigned[:, ::2] | (unsigned[:, 1::2] << 4)


AUDIT_RUNTIME = Audit(audit_graph)
AUDIT_PACKED = Audit(audit_packed)
