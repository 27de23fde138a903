"""PTX of our kernels for a launcher that passes inputs, then integers, then outputs.

TensorRT's Quick Deployable Plugins launch one PTX kernel with its arguments in that order and
nothing behind them. A PTX body reads each parameter by its name, so that the order of a kernel's
parameters is that of its declaration alone: moving the lines of `.entry` suffices, and the machine
code stays what was audited. The scratch pointers that Triton appends are dropped; a kernel that
reads one is refused.
"""

import re
import struct
from collections.abc import Sequence

from treeq_export.errors import RunnerError

_ENTRY = re.compile(r"(\.visible \.entry \w+\()(?P<params>.*?)(\n\)|\))", re.DOTALL)
_NAME = re.compile(r"\b(\w+_param_\d+)\b")


def reorder_params(ptx: str, names: Sequence[str], order: Sequence[str]) -> str:
    """Return PTX whose entry takes its parameters in another order.

    Args:
        ptx: One kernel.
        names: The kernel's parameters in order; the PTX may have scratch pointers after them.
        order: The same names as they will be passed.

    Raises:
        RunnerError: The names do not fit the PTX, or the kernel reads scratch memory.
    """
    found = _ENTRY.search(ptx)
    lines = [] if found is None else [part.strip() for part in found["params"].split(",\n")]
    if found is None or len(lines) < len(names) or sorted(names) != sorted(order):
        raise RunnerError(
            f"PTX with {len(lines)} parameters: expected {', '.join(names)}, to be passed as "
            f"{', '.join(order)}. Run `python -m treeq_gpu.ahead` again."
        )
    body = ptx[found.end() :]
    for line in lines[len(names) :]:
        name = _NAME.search(line)
        if name is None or re.search(rf"\b{name[1]}\b", body):
            raise RunnerError(
                f"PTX: the kernel reads scratch memory ({line}), which TensorRT does not give. "
                "Use the plugin of runners/tensorrt_plugin.py."
            )
    by_name = dict(zip(names, lines, strict=False))
    declared = ",\n\t".join(by_name[name] for name in order)
    return f"{ptx[: found.start()]}{found[1]}\n\t{declared}\n){body}"


def float_bits(value: float) -> int:
    """Return the bits of a float32 as int32: a launcher of integers passes floats so."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
