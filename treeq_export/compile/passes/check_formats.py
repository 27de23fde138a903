"""Passes that refuse, by name, layers that a target has no arithmetic for.

`CheckGrids` refuses grids other than `integer`, the only one of our kernels and plugins.
`CheckFormats` does the same, and refuses formats that a TensorRT target does not have.

Its rules, for layers with quantized activations in target `tensorrt` (the kernels of kernels/gpu):
1. weight_bits and act_bits are 2..8.
2. group_size is 0, all input channels, or a multiple of 32 that divides them.
3. rotation_group is at most 128.

in `tensorrt-native`:
4. Rule 1, and one weight scale per output channel: from block-scaled weights and INT8 activations
   TensorRT builds an engine without a warning that uses the first block's scales only.

for weight-only layers in both:
5. Rule 1 for the weight, and one scale per channel or per block of 16..128 input channels.
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.passes import PassResult

from treeq_export.compile.graph.contract import LayerPass
from treeq_export.compile.graph.signature import (
    QLINEAR,
    QLinearSignature,
    layer_name,
    nodes_of,
    read_signature,
)
from treeq_export.errors import CompileError
from treeq_export.ops import MAX_BITS, MAX_ROTATION, MIN_BITS, PACK_WORD
from treeq_export.quant.grids import INTEGER

MIN_BLOCK, MAX_BLOCK = 16, 128
_SHOWN = 8


class CheckFormats(LayerPass):
    """Check the formats; every QLinear has a form in the target then.

    Args:
        native: Whether the target is `tensorrt-native`.
    """

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self._check = _native_problem if native else _plugin_problem

    def call(self, model: ir.Model) -> PassResult:
        """Change nothing.

        Raises:
            CompileError: Names the layers, what they have and what they may have.
        """

        def problem(signature: QLinearSignature) -> str | None:
            check = self._check if signature.act_bits else _weight_only_problem
            return _grid_problem(signature) or _bits_problem(signature) or check(signature)

        return _refuse(model, problem)


class CheckGrids(LayerPass):
    """Check the grids; every QLinear has the grid `integer` then."""

    def call(self, model: ir.Model) -> PassResult:
        """Change nothing.

        Raises:
            CompileError: Names the layers and their grids.
        """
        return _refuse(model, _grid_problem)


def _refuse(model: ir.Model, problem_of: Callable[[QLinearSignature], str | None]) -> PassResult:
    found: dict[str, list[str]] = {}
    for node in nodes_of(model, QLINEAR):
        problem = problem_of(read_signature(node))
        if problem is not None:
            found.setdefault(problem, []).append(layer_name(node))
    if found:
        raise CompileError(describe_problems(found))
    return PassResult(model, False)


def describe_problems(found: Mapping[str, list[str]]) -> str:
    """Return one line that names what has each problem.

    >>> describe_problems({"group_size 8 is no multiple of 32.": ["blocks.0.a", "blocks.0.b"]})
    'blocks.0.a, blocks.0.b: group_size 8 is no multiple of 32.'
    """
    parts = []
    for problem, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(names[:_SHOWN])}{more}: {problem}")
    return " ".join(parts)


def _grid_problem(signature: QLinearSignature) -> str | None:
    for grid in (signature.weight_grid, signature.act_grid):
        if grid is not INTEGER:
            return (
                f"grid {grid.name}, expected {INTEGER.name}, the only one of the kernels. Compile "
                "for target portable, or search again with another grid."
            )
    return None


def _bits_problem(signature: QLinearSignature) -> str | None:
    for kind, bits in (("weight", signature.weight_bits), ("act", signature.act_bits)):
        if kind == "act" and not bits:
            continue
        if not MIN_BITS <= bits <= MAX_BITS:
            return f"{kind}_bits {bits}, expected {MIN_BITS}..{MAX_BITS}. Search again."
    return None


def _plugin_problem(signature: QLinearSignature) -> str | None:
    group = signature.group_size
    if signature.num_groups > 1 and group % PACK_WORD:
        return (
            f"group_size {group} is no multiple of {PACK_WORD}, which target tensorrt's kernels "
            f"need. Set search.group_size to one, or to null for one scale per channel."
        )
    if signature.rotation_group > MAX_ROTATION:
        return (
            f"rotation_group {signature.rotation_group} is above {MAX_ROTATION}, the largest that "
            f"target tensorrt's kernels rotate by. Set search.rotation_group to {MAX_ROTATION}."
        )
    return None


def _native_problem(signature: QLinearSignature) -> str | None:
    if signature.num_groups > 1:
        return (
            f"group_size {signature.group_size} with {signature.act_bits}-bit activations: "
            "TensorRT builds a wrong engine from block-scaled weights and INT8 activations. Set "
            "search.group_size to null, or compile for target tensorrt, whose plugin has groups."
        )
    return None


def _weight_only_problem(signature: QLinearSignature) -> str | None:
    if signature.num_groups > 1 and not MIN_BLOCK <= signature.group_size <= MAX_BLOCK:
        return (
            f"group_size {signature.group_size} without quantized activations: TensorRT's "
            f"weight-only kernels have blocks of {MIN_BLOCK}..{MAX_BLOCK}. Set search.group_size "
            "to one of these, or to null."
        )
    return None
