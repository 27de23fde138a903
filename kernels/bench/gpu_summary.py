"""What the rows of gpu_qlinear.py say: goals, layers without gain and MMA opcodes, by name."""

import sys
from collections.abc import Sequence
from typing import Any

BASELINE = "bf16"
# Least speedup over cuBLAS bf16 of W3A3 with its quantize pass, by number of tokens.
GOAL_TARGET = "w3a3"
GOALS = ((1, 16, 3.0), (512, 512, 1.0), (1024, 4096, 1.3))
_APART = ("_product", "quantize_")


def is_layer(target: str) -> bool:
    """Whether a row replaces a whole linear layer, quantize pass included."""
    return target.startswith("w") and not any(part in target for part in _APART)


def summarise(
    rows: Sequence[dict[str, Any]], kernels: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return goals with what was measured, and the layers that gain nothing.

    Args:
        rows: From `gpu_qlinear.make_rows`; rows without times are left out.
        kernels: From `gpu_sass.audit_recorded`.
    """
    timed = [row for row in rows if row.get("speedup", {}).get(BASELINE)]
    ours = [row for row in timed if is_layer(row["target"])]
    goals = []
    for low, high, limit in GOALS:
        for row in ours:
            if row["target"] == GOAL_TARGET and low <= row["m"] <= high:
                measured = row["speedup"][BASELINE]
                goals.append(
                    {
                        "shape": row["shape"],
                        "m": row["m"],
                        "limit": limit,
                        **measured,
                        "passed": measured["ratio"] >= limit,
                    }
                )
    without = [
        f"{row['target']} {row['shape']} M={row['m']}: {row['speedup'][BASELINE]['ratio']:.2f}"
        for row in ours
        if row["speedup"][BASELINE]["ratio"] <= 1.0
    ]
    missing = {row["target"]: row["missing"] for row in rows if "missing" in row}
    return {
        "baseline": BASELINE,
        "goals": goals,
        "goals_met": sum(goal["passed"] for goal in goals),
        "without_gain": without,
        "mma": {kernel["kernel"]: " ".join(kernel["mma"]) or "none" for kernel in kernels},
        "missing": missing,
    }


def table(record: dict[str, Any]) -> list[str]:
    """Return the speedups over the baseline as lines: one row per shape and tokens."""
    rows = [row for row in record["rows"] if row.get("speedup")]
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"] != BASELINE))
    lines = ["speedup over cuBLAS bf16", f"{'shape':6} {'M':>5} " + _cells(targets)]
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        ratio = row["speedup"].get(BASELINE, {}).get("ratio")
        if ratio is not None:
            cells.setdefault((row["shape"], row["m"]), {})[row["target"]] = ratio
    for (shape, m), found in cells.items():
        values = [f"{found[t]:.2f}" if t in found else "-" for t in targets]
        lines.append(f"{shape:6} {m:5} " + _cells(values))
    return lines


def without_gain_lines(names: Sequence[str]) -> list[str]:
    """Return the layers without gain as lines: one per target and shape, with its tokens."""
    tokens: dict[str, list[str]] = {}
    for name in names:  # such as "w3a3 fc1 M=256: 0.90"
        layer, _, rest = name.partition(" M=")
        tokens.setdefault(layer, []).append(rest.split(":")[0])
    lines = [f"layers without gain: {len(names)}"]
    return lines + [f"  {layer} M={','.join(found)}" for layer, found in tokens.items()]


def mma_lines(opcodes: dict[str, str]) -> list[str]:
    """Return the MMA opcodes of SASS as lines, each with the kernels that run it."""
    kernels: dict[str, list[str]] = {}
    for kernel, opcode in opcodes.items():
        kernels.setdefault(opcode, []).append(kernel)
    return [f"MMA {opcode}: {', '.join(found)}" for opcode, found in kernels.items()]


def _cells(words: Sequence[str]) -> str:
    return " ".join(f"{word[:14]:>14}" for word in words)


def print_summary(record: dict[str, Any]) -> None:
    """Print the table, the goals and what is wrong."""
    integers, summary = record["integers"], record["summary"]
    lines = table(record) if record["summary"]["goals"] else []
    lines.append(
        f"integers: {integers['num_cases']} cases, {len(integers['failures'])} differ"
        + (" (emulated, untimed)" if record["emulated"] else "")
    )
    lines += integers["failures"][:10]
    lines.append(f"goals met: {summary['goals_met']} of {len(summary['goals'])}")
    lines += without_gain_lines(summary["without_gain"])
    lines += mma_lines(summary["mma"])
    lines += [f"{target} missing: {why}" for target, why in summary["missing"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
