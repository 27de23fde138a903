"""Writes kernels/include/treeq/op.h, what the kernels in C++ have to know of treeq_export/ops.py.

python kernels/write_op_header.py
"""

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from treeq_export import ops  # noqa: E402  from this checkout, installed or not

HEADER = ROOT / "kernels" / "include" / "treeq" / "op.h"
LIMITS = ("MIN_BITS", "MAX_BITS", "PACK_WORD", "MAX_ROTATION", "MAX_IN_FEATURES")
# Type in C and macro of each kind of field.
FIELDS = {int: ("int32_t", "INT"), float: ("float", "REAL"), str: ("int32_t", "SCALE")}


def fill(members: Iterable[str]) -> list[str]:
    """Return lines of an enum's members, each of them whole."""
    text = ", ".join(member.replace(" ", "\0") for member in members)
    lines = textwrap.wrap(text + ",", width=100, initial_indent="  ", subsequent_indent="  ")
    return [line.replace("\0", " ") for line in lines]


def enumerate_names(kind: str, prefix: str, numbers: dict[str, int]) -> Iterator[str]:
    """Yield an enum, and the array of its names by number."""
    members = sorted(numbers.items(), key=lambda item: item[1])
    yield "typedef enum {"
    yield from fill(f"TREEQ_{prefix}_{name.upper()} = {number}" for name, number in members)
    names = ", ".join(f'"{name}"' for name, _ in members)
    yield from (f"}} treeq_{kind};", f"#define TREEQ_{prefix}_NAMES {{{names}}}", "")


def describe(op: ops.OpDefinition, prefix: str) -> Iterator[str]:
    """Yield an op's name, and the positions of its inputs, how many there are and have to be."""
    yield f'#define {prefix} "{op.name}"'
    positions = [f"{prefix}_{name.upper()}" for name in op.inputs]
    counts = [f"{prefix}_INPUTS", f"{prefix}_REQUIRED = {op.num_required}"]
    yield from ("enum {", *fill((*positions, *counts)), "};", "")


def header() -> str:
    """Return the text of op.h."""
    fields = [(name, *FIELDS[kind]) for name, kind in ops.LAYER_ATTRIBUTES.items()]
    lines = [
        "/* Written by kernels/write_op_header.py from treeq_export/ops.py, which explains it. */",
        "#ifndef TREEQ_OP_H",
        "#define TREEQ_OP_H",
        "",
        "#include <stdint.h>",
        "",
        f'#define TREEQ_DOMAIN "{ops.DOMAIN}"',
        f'#define TREEQ_OP_VERSION "{ops.PLUGIN_VERSION}"',
        *(f"#define TREEQ_{name} {getattr(ops, name)}" for name in LIMITS),
        f"#define TREEQ_MAX_OUTPUTS {ops.FUSED.num_outputs}",
        "",
        *enumerate_names("act_scale", "SCALE", {s.value: s.number for s in ops.ActScale}),
        *enumerate_names(
            "activation", "ACTIVATION", {name: i for i, name in enumerate(ops.ACTIVATIONS)}
        ),
        "typedef struct {",
        *(f"  {kind} {name};" for name, kind, _ in fields),
        "} treeq_layer_format;",
        "",
        "/* The fields in order. SCALE is a treeq_act_scale, which is text in a node. */",
        "#define TREEQ_LAYER_FIELDS(INT, REAL, SCALE) \\",
        f"  {' '.join(f'{macro}({name})' for name, _, macro in fields[:4])} \\",
        f"  {' '.join(f'{macro}({name})' for name, _, macro in fields[4:])}",
        "",
    ]
    for name in ("QLINEAR", "FUSED", "MONARCH"):
        lines += describe(getattr(ops, name), f"TREEQ_{name}")
    return "\n".join([*lines, "#endif", ""])


if __name__ == "__main__":
    HEADER.write_text(header())
