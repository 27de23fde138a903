"""Compare every layer's chosen branch shape with plain low rank and plain Monarch.

treeq-export search --run runs/branches --recipe samples/digits/recipe.yaml \
    --set search.strategy=uniform --set "search.branch_budget={parameter_fraction: 0.125, grids: 8}"
python samples/digits/branch_table.py runs/branches/search.json --out branches.json
"""

import json
from pathlib import Path
from typing import Any

import click


def describe(trial: dict[str, Any]) -> dict[str, Any]:
    """Return a trial with its shape as text, such as "2x2 r4"."""
    shape = f"{trial['b_in']}x{trial['b_out']} r{trial['rank']}"
    return {"shape": shape, **{k: trial[k] for k in ("num_parameters", "error", "held_out_error")}}


@click.command()
@click.argument("search", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(search: Path, out: Path) -> None:
    """Write one row per layer: relative squared output errors at equal parameter budgets."""
    rows: dict[str, dict[str, Any]] = {}
    for layer, trials in json.loads(search.read_text())["branches"].items():
        low_rank = next(t for t in trials if t["b_in"] == t["b_out"] == 1)
        # Of the square grids with more than one block, the best: trials are sorted by error.
        monarch = next(t for t in trials if t["b_in"] == t["b_out"] > 1)
        rows[layer] = {
            "chosen": describe(trials[0]),
            "low_rank": describe(low_rank),
            "monarch": describe(monarch),
        }
    out.write_text(json.dumps(rows, indent=1) + "\n")
    for other in ("low_rank", "monarch"):
        ratios = [row["chosen"]["error"] / row[other]["error"] for row in rows.values()]
        least, most = min(ratios), max(ratios)
        equal = sum(ratio == 1.0 for ratio in ratios)
        click.echo(f"chosen / {other}: {least:.3f}..{most:.3f}, equal in {equal} of {len(rows)}")


if __name__ == "__main__":
    main()
