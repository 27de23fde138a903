"""Reading the machine code of an object file: functions, loops, and moves of one element."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Moves of one element to or from a vector register, of x86-64 and of ARM. Broadcasts and whole
# registers are none; neither are vmovd and vmovq, which also carry addresses and counts, nor ARM's
# loads of one float, which its multiplication by one element takes for a broadcast.
SINGLE = re.compile(
    r"v?(movss|movsd|insertps|extractps|pinsr[bwdq]|pextr[bwdq]|unpcklps)\s"
    r"|(str|stp|stur)\s+s\d"
    r"|(ld1|st1)\s+\{v\d+\.\w\}\["
    r"|(mov|ins|umov|smov)\s.*v\d+\.\w+\[\d+\]"
)
LABEL = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(.*)$")
BRANCH = re.compile(r"(j\w+|b\.\w+|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <")
LEAVES = re.compile(r"(jmp|call|ret|b|bl|br|blr)\b(?!\.)")


@dataclass(frozen=True)
class Function:
    """One function's instructions, as (address, text)."""

    name: str
    code: list[tuple[int, str]]

    def count_moves(self) -> int:
        """Return how many moves of one element there are."""
        return count_moves(self.code)

    def inner_loops(self) -> list[list[tuple[int, str]]]:
        """Return the loops that nothing leaves or enters in the middle: the innermost ones.

        Each is from the target of a conditional branch backwards to that branch; it holds no call,
        no unconditional jump and no other loop.
        """
        if not self.code:
            return []
        loops = []
        for at, (address, text) in enumerate(self.code):
            branch = BRANCH.match(text)
            if branch is None or not self.code[0][0] <= int(branch[2], 16) <= address:
                continue
            target = int(branch[2], 16)
            body = [entry for entry in self.code[: at + 1] if entry[0] >= target]
            if not any(LEAVES.match(line) for _, line in body):
                loops.append(body)
        return [
            loop
            for loop in loops
            if not any(other is not loop and is_inside(other, loop) for other in loops)
        ]


def is_inside(inner: list[tuple[int, str]], outer: list[tuple[int, str]]) -> bool:
    """Whether a loop lies in another one."""
    return outer[0][0] <= inner[0][0] and inner[-1][0] <= outer[-1][0]


def count_moves(code: list[tuple[int, str]]) -> int:
    """Return how many moves of one element an instruction list has."""
    return sum(SINGLE.match(text) is not None for _, text in code)


def disassemble(path: Path, objdump: str = "objdump") -> list[Function]:
    """Return the functions of an object file."""
    done = subprocess.run(
        [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    functions: list[Function] = []
    for line in done.stdout.splitlines():
        if label := LABEL.match(line):
            functions.append(Function(label[1], []))
        elif functions and (instruction := INSTRUCTION.match(line)):
            functions[-1].code.append((int(instruction[1], 16), instruction[2]))
    return functions
