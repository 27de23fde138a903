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

from collections.abc import Iterable, Iterator
from itertools import islice

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


class CheckGrids(LayerPass):
    """Check the grids; every QLinear has the grid `integer` then."""

    def call(self, model: ir.Model) -> PassResult:
        """Change nothing.

        Raises:
            CompileError: Names the layers, what they have and what they may have.
        """
        text = describe_problems(
            (layer_name(node), problem)
            for node in nodes_of(model, QLINEAR)
            for problem in islice(self._problems(read_signature(node)), 1)
        )
        if text:
            raise CompileError(text)
        return PassResult(model, False)

    def _problems(self, form: QLinearSignature) -> Iterator[str]:
        for grid in (form.weight_grid, form.act_grid):
            if grid is not INTEGER:
                yield (
                    f"grid {grid.name}, expected {INTEGER.name}, the only one of the kernels. "
                    "Compile for target portable, or search again with another grid."
                )


class CheckFormats(CheckGrids):
    """Check the formats; every QLinear has a form in the target then.

    Args:
        native: Whether the target is `tensorrt-native`.
    """

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self._native = native

    def _problems(self, form: QLinearSignature) -> Iterator[str]:
        yield from super()._problems(form)
        group = form.group_size if form.num_groups > 1 else 0
        for kind, bits in (("weight", form.weight_bits), ("act", form.act_bits or MIN_BITS)):
            if not MIN_BITS <= bits <= MAX_BITS:
                yield f"{kind}_bits {bits}, expected {MIN_BITS}..{MAX_BITS}. Search again."
        if not form.act_bits:
            if group and not MIN_BLOCK <= group <= MAX_BLOCK:
                yield (
                    f"group_size {group} without quantized activations: TensorRT's weight-only "
                    f"kernels have blocks of {MIN_BLOCK}..{MAX_BLOCK}. Set search.group_size to "
                    "one of these, or to null."
                )
        elif self._native:
            if group:
                yield (
                    f"group_size {group} with {form.act_bits}-bit activations: TensorRT builds a "
                    "wrong engine from block-scaled weights and INT8 activations. Set "
                    "search.group_size to null, or compile for target tensorrt, whose plugin has "
                    "groups."
                )
        else:
            yield from _plugin_problems(form, group)


def _plugin_problems(form: QLinearSignature, group: int) -> Iterator[str]:
    if group % PACK_WORD:
        yield (
            f"group_size {group} is no multiple of {PACK_WORD}, which target tensorrt's kernels "
            f"need. Set search.group_size to one, or to null for one scale per channel."
        )
    if form.rotation_group > MAX_ROTATION:
        yield (
            f"rotation_group {form.rotation_group} is above {MAX_ROTATION}, the largest that "
            f"target tensorrt's kernels rotate by. Set search.rotation_group to {MAX_ROTATION}."
        )


def describe_problems(problems: Iterable[tuple[str, str]]) -> str:
    """Return one line that names what has each problem; nothing where there are none.

    Args:
        problems: Names, each with a problem of it.

    >>> describe_problems([("blocks.0.a", "3 is odd."), ("blocks.0.b", "3 is odd.")])
    'blocks.0.a, blocks.0.b: 3 is odd.'
    """
    found: dict[str, dict[str, None]] = {}
    for name, problem in problems:
        found.setdefault(problem, {})[name] = None
    parts = []
    for problem, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(islice(names, _SHOWN))}{more}: {problem}")
    return " ".join(parts)
