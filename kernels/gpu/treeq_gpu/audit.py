"""Read from a cubin whether the compiler made what was meant.

    python -m treeq_gpu.audit DIR [--json FILE]

prints a table of DIR/kernels.json and fails, naming the kernels, where

- a product does not run on the tensor cores by the instruction meant: IGMMA (wgmma) on sm_90 for
  tiles of at least 64 tokens, IMMA elsewhere; HMMA or HGMMA for floating point;
- the main loop touches local memory (a spill), or decoding a weight costs more than its budget;
- shared memory is more than a program may have on the architecture.

The main loop is the backward branch around the most MMA instructions, the shortest of them.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends import nvidia

from treeq_gpu.instantiations import INSTANTIATIONS, Instantiation

BINARIES = Path(nvidia.__file__).parent / "bin"
# What one program may have, of the architecture's tuning guides.
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_120": 99 * 1024,
}
_LINE = re.compile(
    r"^(?P<label>\.L_\w+):"
    r"|^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*);",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_MMA = ("IMMA", "IGMMA", "HMMA", "HGMMA")
_LOCAL = ("LDL", "STL")
# On the integer pipes, one result per thread; uniform (U*) instructions run once per warp.
_INTEGER = (
    *("LOP3", "SHF", "PRMT", "IMAD", "IADD3", "IADD", "VIADD", "LEA", "SEL"),
    *("IMNMX", "VIMNMX", "ISETP", "IABS"),
)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its address, the opcode with modifiers and, of a branch, its target."""

    address: int
    opcode: str
    target: int | None = None


def parse_sass(listing: str) -> list[Instruction]:
    """Return the instructions of a listing of nvdisasm."""
    lines: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for match in _LINE.finditer(listing):
        if match["label"]:
            waiting.append(match["label"])
            continue
        address = int(match["address"], 16)
        labels |= dict.fromkeys(waiting, address)
        waiting.clear()
        lines.append((address, match["opcode"], match["rest"]))
    return [
        Instruction(address, opcode, labels.get(found[1]) if found else None)
        for address, opcode, rest in lines
        for found in [_TARGET.search(rest) if opcode.startswith("BRA") else None]
    ]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_usage(cubin: Path) -> tuple[int, int]:
    """Return (registers, stack_bytes) of a cubin that holds one kernel."""
    usage = dict(
        re.findall(r"(REG|STACK):(\d+)", _run(BINARIES / "cuobjdump", "-res-usage", cubin))
    )
    return int(usage["REG"]), int(usage["STACK"])


def count_opcodes(instructions: list[Instruction]) -> Counter[str]:
    """Return how often each opcode is there, without modifiers."""
    return Counter(i.opcode.split(".")[0] for i in instructions)


def find_main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions of the main loop, none where no loop has an MMA."""
    best: list[Instruction] = []
    score = (0, 0)
    for branch in instructions:
        if branch.target is None or branch.target > branch.address:
            continue
        body = [i for i in instructions if branch.target <= i.address <= branch.address]
        found = count_opcodes(body)
        this = (sum(found[name] for name in _MMA), -len(body))
        if this[0] and (not best or this > score):
            best, score = body, this
    return best


def integer_per_code(instantiation: Instantiation, opcodes: Counter[str]) -> float:
    """Return integer instructions of the main loop per four weight codes, addresses included."""
    constants = instantiation.constants
    words = constants["BN"] * constants["BK"] / 4 / (32 * instantiation.num_warps)
    return sum(opcodes[name] for name in _INTEGER) / words


def audit_cubin(cubin: Path, instantiation: Instantiation, architecture: str) -> dict[str, Any]:
    """Return registers, stack_bytes and what the main loop holds.

    Args:
        cubin: The file.
        instantiation: What it was compiled from.
        architecture: GPU architecture, such as "sm_90".
    """
    registers, stack_bytes = read_usage(cubin)
    instructions = parse_sass(_run(BINARIES / "nvdisasm", "-c", "-ndf", cubin))
    total, loop = count_opcodes(instructions), count_opcodes(find_main_loop(instructions))
    num_mma = sum(loop[name] for name in _MMA)
    result: dict[str, Any] = {
        "registers": registers,
        "stack_bytes": stack_bytes,
        "mma_meant": list(expected_mma(instantiation, architecture)),
        "mma": {name: total[name] for name in _MMA if total[name]},
        "loop_instructions": sum(loop.values()),
        "loop_mma": num_mma,
        "loop_integer": sum(loop[name] for name in _INTEGER),
        "loop_local": sum(loop[name] for name in _LOCAL),
    }
    if instantiation.module == "qlinear" and num_mma:
        result["integer_per_4_codes"] = round(integer_per_code(instantiation, loop), 2)
    return result


def expected_mma(instantiation: Instantiation, architecture: str) -> tuple[str, ...]:
    """Return the MMA instructions of which one has to be there, none where no product is."""
    constants = instantiation.constants
    if "BITS" in constants:
        wide = architecture == "sm_90" and constants["BM"] >= 64
        return ("IGMMA",) if wide else ("IMMA",)
    if instantiation.module == "monarch" or constants.get("GROUP", 1) > 1:
        return ("HMMA", "HGMMA")
    return ()


def integer_budget(instantiation: Instantiation) -> float:
    """Return the integer instructions of the main loop allowed per four codes.

    A bit of four codes costs a shift and a mask with insertion; 5 is for addresses and counters (at
    3 bits, decoding each code by itself takes 37 in all). Scales per group have their addresses,
    one or two for each column of a tile that a thread holds, and where threads share a word its
    bytes are reordered.
    """
    constants = instantiation.constants
    budget = 2.5 * constants["BITS"] + 5
    if not constants.get("GROUP_SIZE"):
        return budget
    words = constants["BN"] * constants["BK"] / 4 / (32 * instantiation.num_warps)
    return budget + (40 + 1.0 * constants["BN"]) / words


def problems_of(entry: dict[str, Any]) -> list[str]:
    """Return what is wrong with an entry of kernels.json."""
    instantiation, audit = INSTANTIATIONS[entry["name"]], entry["audit"]
    problems = []
    wanted = audit["mma_meant"]
    if wanted and not any(audit["mma"].get(name) for name in wanted):
        problems.append(f"no {' or '.join(wanted)}")
    if wanted and not audit["loop_mma"]:
        problems.append("no main loop")
    if audit["loop_local"]:
        problems.append(f"{audit['loop_local']} spills in the main loop")
    limit = SHARED_LIMIT_BYTES[entry["arch"]]
    if entry["shared_bytes"] > limit:
        problems.append(f"{entry['shared_bytes']} bytes of shared memory, limit {limit}")
    cost = audit.get("integer_per_4_codes")
    if cost is not None and cost > (budget := integer_budget(instantiation)):
        problems.append(f"{cost} integer instructions per 4 codes, budget {budget:.1f}")
    return problems


def table_of(entries: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of entries of kernels.json."""
    head = (
        f"{'kernel':34} {'arch':6} {'regs':>4} {'stack':>5} {'shared':>6} {'loop':>5} "
        f"{'MMA':>4} {'int':>4} {'spill':>5} {'int/4':>6}  MMA of the whole kernel"
    )
    lines = [head]
    for e in entries:
        a = e["audit"]
        kinds = " ".join(f"{name} {count}" for name, count in a["mma"].items())
        lines.append(
            f"{e['name']:34} {e['arch']:6} {e['registers']:4} {e['stack_bytes']:5} "
            f"{e['shared_bytes']:6} {a['loop_instructions']:5} {a['loop_mma']:4} "
            f"{a['loop_integer']:4} {a['loop_local']:5} {a.get('integer_per_4_codes', ''):>6}  "
            f"{kinds}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m treeq_gpu.audit", description=__doc__)
    parser.add_argument("folder", type=Path, help="what treeq_gpu.ahead wrote")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    options = parser.parse_args(argv)
    manifest = json.loads((options.folder / "kernels.json").read_text())
    entries = manifest["kernels"]
    failed = {(e["name"], e["arch"]): p for e in entries if (p := problems_of(e))}
    sys.stdout.write("\n".join(table_of(entries)) + "\n")
    for (name, arch), problems in failed.items():
        sys.stdout.write(f"{name} for {arch}: {'; '.join(problems)}\n")
    sys.stdout.write(f"{len(entries) - len(failed)} of {len(entries)} kernels pass\n")
    if options.json:
        kept = ("name", "arch", "registers", "stack_bytes", "shared_bytes", "audit")
        rows = ",\n".join(json.dumps({key: e[key] for key in kept}) for e in entries)
        version = json.dumps(manifest["triton"])
        options.json.write_text(f'{{"triton": {version}, "kernels": [\n{rows}\n]}}\n')
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
