"""The picture and the table of bench_qlinear.py."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

LABELS = {
    "treeq_w3a3": "treeq W3A3",
    "treeq_w4a4": "treeq W4A4",
    "treeq_w8a8": "treeq W8A8",
    "ort_int8_static": "ONNX Runtime INT8, static",
    "ort_int8_dynamic": "ONNX Runtime INT8, dynamic",
    "ort_matmulnbits4": "ONNX Runtime MatMulNBits 4",
    "torch_int8_dynamic": "PyTorch INT8, dynamic",
    "torch_fp32": "PyTorch float32",
}
COLORS = ("#1d5fbf", "#5b93e0", "#9dc0f0", "#d9730d", "#eba35c", "#0f8f74", "#8a94a3", "#c4cad3")


def draw_speed(record: dict[str, Any], path: Path) -> None:
    """Write the bars: times faster than ONNX Runtime float32, a block's four linears."""
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=150)
    axes = figure.subplots()
    tokens = record["tokens"]
    width = 0.85 / len(LABELS)
    for index, (target, label) in enumerate(LABELS.items()):
        rows = [row for row in record["block"] if row["target"] == target]
        places = [tokens.index(row["m"]) + (index - len(LABELS) / 2) * width for row in rows]
        heights = [row["ratio"] for row in rows]
        low = [max(row["ratio"] - row["low"], 0) for row in rows]
        high = [max(row["high"] - row["ratio"], 0) for row in rows]
        axes.bar(places, heights, width, color=COLORS[index], label=label, yerr=[low, high])
    axes.axhline(1.0, color="#555", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(tokens)), [f"M = {m}" for m in tokens])
    axes.set_ylabel("times faster than ONNX Runtime float32")
    axes.set_title("The four linears of a DiT-XL/2 block, one thread", loc="left", fontsize=11)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def print_table(record: dict[str, Any]) -> None:
    """Print the ratios, and how much of the peak each width reaches on the largest shape."""
    table = Table(title="Times faster than ONNX Runtime float32, four linears of a block")
    table.add_column("target")
    for m in record["tokens"]:
        table.add_column(f"M={m}", justify="right")
    for target in dict.fromkeys(row["target"] for row in record["block"]):
        ratios = [row["ratio"] for row in record["block"] if row["target"] == target]
        table.add_row(target, *(f"{ratio:.2f}" for ratio in ratios))
    console = Console()
    console.print(table)
    for row in record["rows"]:
        if row["shape"] == "fc2" and row["target"].startswith("treeq"):
            peak = next(
                other["gops"]
                for other in record["rows"]
                if other["target"] == "peak" and (other["shape"], other["m"]) == ("fc2", row["m"])
            )
            share = 100 * row["gops"] / peak
            console.print(
                f"fc2 M={row['m']} {row['target']}: {row['gops']:.0f} GOP/s, {share:.0f} %"
            )
