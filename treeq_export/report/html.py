"""`report.html`: one self-contained file. It loads nothing, runs nothing, and carries no date.

Texts from a run (layer names, environment) are escaped by jinja2; only the plots, whose text
matplotlib has escaped, are inserted as they are. Paths are shown relative to the run folder.
"""

# jinja2 leaves the type of its filters open.
# pyright: reportUnknownMemberType=false

import base64
import os
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from treeq_export import __version__
from treeq_export.errors import PlanError
from treeq_export.reading import read_bytes
from treeq_export.recipe import Recipe
from treeq_export.records import AuditLayer, TargetParity
from treeq_export.report import figures, quantities, search_figures
from treeq_export.report.branches import tabulate_branches
from treeq_export.report.heatmap import lay_out_bits
from treeq_export.report.report import STAGE_OF_SECTION, Report, judge
from treeq_export.report.summary import baseline_speedups, sort_worst_first
from treeq_export.report.tiles import describe_speedup, make_tiles
from treeq_export.report.tree import draw_tree
from treeq_export.targets.names import FP32

TEMPLATE = "template.html.j2"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Narrower images are enlarged without smoothing, which would hide what quantization did.
PIXELATED_BELOW = 512

# Recipe entries that are files: section and key.
_PATHS = (
    ("model", "checkpoint"),
    ("model", "conditioning"),
    ("evaluate", "classifier"),
    ("evaluate", "reference"),
)


@dataclass(frozen=True)
class Grid:
    """A picture of samples.

    Attributes:
        title: Subject of the picture.
        uri: The PNG as a data URI; empty where it cannot be shown.
        problem: Why it cannot be shown; empty where it can.
        pixelated: Whether to enlarge it without smoothing.
    """

    title: str
    uri: str
    problem: str
    pixelated: bool


@dataclass(frozen=True)
class AuditRow:
    """What the targets made of one layer.

    Attributes:
        name: The layer.
        entries: One per target, in the order of `Report.targets`; None where it is not listed.
    """

    name: str
    entries: tuple[AuditLayer | None, ...]

    @property
    def problem(self) -> bool:
        """Whether a target lost the layer, or computes it in floating point unasked."""
        return any(
            entry is None or not (entry.integer or entry.weight_only) for entry in self.entries
        )


def render_html(report: Report) -> str:
    """Return the page."""
    return make_environment().get_template(TEMPLATE).render(_make_view(report)) + "\n"


def make_environment(*packages: str) -> Environment:
    """Return an environment with the filters of a page.

    Args:
        packages: Packages whose templates come before those of this one.
    """
    folders = [resources.files(package) for package in (*packages, "treeq_export.report")]

    def read(name: str) -> str:
        folder = next(folder for folder in folders if (folder / name).is_file())
        return (folder / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {
            "runtime": quantities.name_with_runtime,
            "number": quantities.format_number,
            "limit": quantities.format_limit,
            "fixed": quantities.format_fixed,
            "db": quantities.format_db,
            "percent": quantities.format_percent,
            "bytes": quantities.format_bytes,
            "count": quantities.format_count,
            "ratio": quantities.format_ratio,
            "seconds": quantities.format_seconds,
            "spread": quantities.format_spread,
            "worst": sort_worst_first,
            "speedup": describe_speedup,
        }
    )
    return environment


def _make_view(report: Report) -> dict[str, Any]:
    """Return what the template shows."""
    return {
        "version": __version__,
        "report": report,
        "plan": report.plan,
        "recipe": report.recipe,
        "verdict": judge(report),
        "tiles": make_tiles(report),
        "heatmap": lay_out_bits(report.plan),
        "gates": report.gates,
        "gate_texts": quantities.format_gate,
        "remedies": {
            section: f"treeq-export {stage} --run DIR"
            for section, stage in STAGE_OF_SECTION.items()
        },
        "plots": _draw_plots(report),
        "grids": _read_grids(report),
        "branches": tabulate_branches(report.search.branches if report.search else {}),
        "speedups": baseline_speedups(report.bench) if report.bench else [],
        "layers": {layer.name: layer for layer in report.plan.layers},
        "parity_tables": [
            (target, _summarize_layers(target))
            for target in (report.parity.targets if report.parity else [])
        ],
        "audit": _collect_audit(report),
        "environment": quantities.flatten(report.bench.environment) if report.bench else [],
        "recipe_yaml": dump_recipe(report.recipe, report.run),
        "fp32_compiled": any(entry.target == FP32 for entry in report.compiled.targets),
    }


def _draw_plots(report: Report) -> dict[str, Markup]:
    """Return the plots by section, empty where there is nothing to draw."""
    names = ("parity", "speed", "size", "tree", "front", "training")
    plots: dict[str, Markup] = {name: Markup("") for name in names}
    if report.parity and report.parity.targets:
        blocks = {layer.name: layer.tree.block for layer in report.plan.layers}
        limit = report.recipe.validate_.gates.min_layer_sqnr_db
        plots["parity"] = Markup(figures.draw_parity(report.parity.targets, blocks, limit))
    if report.bench and report.bench.rows:
        plots["speed"] = Markup(figures.draw_speed(report.bench.rows, report.targets))
    if report.search and report.search.nodes:
        plots["tree"] = Markup(draw_tree(report.search.nodes))
    if report.search and report.search.front:
        plots["front"] = Markup(search_figures.draw_front(report.search))
    if report.finetune and report.finetune.curve:
        plots["training"] = Markup(search_figures.draw_training(report.finetune))
    sizes = [(entry.target, entry.size_bytes) for entry in report.compiled.targets]
    if sizes:
        plots["size"] = Markup(figures.draw_sizes(sizes, report.size["fp32_bytes"]))
    return plots


def _summarize_layers(target: TargetParity) -> dict[str, Any]:
    """Return the extremes over a target's layers; None where nothing is quantized."""
    layers = target.layers
    codes = [x.equal_code_fraction for x in layers if x.equal_code_fraction is not None]
    sums = [x.accumulators_equal for x in layers if x.accumulators_equal is not None]
    worst = sort_worst_first(layers)[:1]
    return {
        "worst": worst[0] if worst else None,
        "least_codes": min(codes) if codes else None,
        "equal_sums": sum(sums),
        "num_sums": len(sums),
    }


def _collect_audit(report: Report) -> list[AuditRow]:
    by_target = {
        compiled.target: {entry.name: entry for entry in compiled.audit}
        for compiled in report.compiled.targets
        if compiled.target != FP32
    }
    names = dict.fromkeys(name for audit in by_target.values() for name in audit)
    return [
        AuditRow(name, tuple(by_target[target].get(name) for target in report.targets))
        for name in names
    ]


def _read_grids(report: Report) -> list[Grid]:
    quality = report.quality
    if quality is None:
        return []
    titles = {"fp": "Full precision", "baseline": "Baseline", "quantized": "Quantized"}
    if quality.baseline is not None:
        base, plan = quality.baseline, report.plan
        titles["baseline"] = _bits_title(
            f"{base.strategy.capitalize()} bits", base.weight_bits, base.activation_bits
        )
        titles["quantized"] = _bits_title(
            "Ours", plan.average_weight_bits, plan.average_activation_bits
        )
    found = quality.grids
    ordered = sorted(found, key=lambda key: [*titles, key].index(key))
    return [read_grid(report.run, titles.get(key, key), found[key]) for key in ordered]


def _bits_title(what: str, weight_bits: float, activation_bits: float) -> str:
    bits = [quantities.format_fixed(value) for value in (weight_bits, activation_bits)]
    return f"{what}, W {bits[0]} A {bits[1]}"


def read_grid(run: Path, title: str, name: str) -> Grid:
    """Read a PNG of the run folder; one that is missing or something else is named instead."""
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        return Grid(title, "", f"{name}: outside the run folder", pixelated=False)
    if not path.is_file():
        return Grid(title, "", f"{name}: missing", pixelated=False)
    try:
        data = read_bytes(path, error=PlanError, remedy="")
    except PlanError:
        return Grid(title, "", f"{name}: cannot be read", pixelated=False)
    if len(data) < 24 or not data.startswith(PNG_SIGNATURE):
        return Grid(title, "", f"{name}: not a PNG file", pixelated=False)
    (width,) = struct.unpack(">I", data[16:20])
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return Grid(title, uri, "", pixelated=width < PIXELATED_BELOW)


def dump_recipe(recipe: Recipe, run: Path) -> str:
    """Return the recipe as YAML, its paths relative to the run folder.

    Saved there, it is a recipe that works: recipes take paths relative to themselves.
    """
    values = recipe.model_dump(mode="json", by_alias=True)
    for section, key in _PATHS:
        path = values[section][key]
        if path is not None:
            relative = os.path.relpath(path, run.absolute())
            values[section][key] = relative.replace(os.sep, "/")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
