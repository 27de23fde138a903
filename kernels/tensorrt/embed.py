"""Write the assembly that embeds compiled kernels into libtreeq_plugins.so.

    python embed.py CUBIN_DIR OUTPUT.S

CUBIN_DIR is what `python -m treeq_gpu.ahead --out CUBIN_DIR` made: kernels.json and cubins. The
assembly holds each cubin by `.incbin` and a table of `treeq::trt::Kernel` (kernels.h), sorted by
name and capability. A cubin whose digest differs from kernels.json is refused.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

HEADER = """\
/* Written by embed.py; kernels.h says what the table holds. */
#if defined(__aarch64__)
#define PROGBITS %progbits
#else
#define PROGBITS @progbits
#endif
"""


def hidden_marks(params: list[list[str]]) -> str:
    """Return the parameters' names, each with a comma; "*" for the hidden trailing pointers.

    A hidden pointer is one that Triton appends; it has no name of a kernel's argument.

    >>> hidden_marks([["x", "*fp16"], ["M", "i32"], ["scratch0", "*i8"]])
    'x,M,*,'
    """
    return "".join("*," if re.fullmatch(r"scratch\d+", name) else f"{name}," for name, _ in params)


def read_kernels(folder: Path) -> list[dict[str, Any]]:
    """Return the records of kernels.json, sorted as the table is; checks every file's digest."""
    kernels = json.loads((folder / "kernels.json").read_text())["kernels"]
    for kernel in kernels:
        path = folder / kernel["file"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != kernel["sha256"]:
            message = (
                f"{path}: sha256 {digest}, expected {kernel['sha256']} as in kernels.json; run "
                f"`python -m treeq_gpu.ahead --out {folder}` again"
            )
            raise SystemExit(message)
    return sorted(kernels, key=lambda kernel: (kernel["name"].encode(), capability_of(kernel)))


def capability_of(kernel: dict[str, Any]) -> int:
    """Return 90 for "sm_90"."""
    return int(kernel["arch"].removeprefix("sm_"))


def write_assembly(kernels: list[dict[str, Any]], folder: Path) -> str:
    """Return the text of the assembly."""
    strings: dict[str, str] = {}

    def label(text: str) -> str:
        return strings.setdefault(text, f".Ltext{len(strings)}")

    rows, cubins = [], []
    for index, kernel in enumerate(kernels):
        path = (folder / kernel["file"]).resolve()
        cubins.append(f'.p2align 6\n.Lcubin{index}: .incbin "{path}"')
        names = [kernel["name"], kernel["function"], hidden_marks(kernel["params"])]
        pointers = ", ".join([*(label(name) for name in names), f".Lcubin{index}"])
        numbers = (capability_of(kernel), kernel["shared_bytes"], kernel["num_warps"], 0)
        rows.append(
            f".8byte {pointers}, {path.stat().st_size}\n"
            f".4byte {', '.join(str(number) for number in numbers)}"
        )
    texts = [f'{name}: .asciz "{text}"' for text, name in strings.items()]
    symbols = [
        f".globl {name}\n.hidden {name}" for name in ("treeq_kernel_table", "treeq_num_kernels")
    ]
    sections = [
        HEADER,
        *symbols,
        '.section .rodata.treeq, "a", PROGBITS',
        *cubins,
        *texts,
        f".p2align 3\ntreeq_num_kernels: .8byte {len(kernels)}",
        '.section .data.rel.ro.treeq, "aw", PROGBITS',
        ".p2align 3\ntreeq_kernel_table:",
        *rows,
        '.section .note.GNU-stack, "", PROGBITS',
    ]
    return "\n".join([*sections, ""])


def main(folder: Path, output: Path) -> None:
    """Write `output` for the kernels in `folder`."""
    output.write_text(write_assembly(read_kernels(folder), folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
