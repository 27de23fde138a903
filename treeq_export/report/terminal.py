"""The report in a terminal: the figures of report.json, the gates, and where the page is.

Texts go through `rich.text.Text`, so that a layer called "[red]" is printed as it is.
"""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from treeq_export.records import BenchRecord, ParityRecord, QualityRecord, QualityScores
from treeq_export.report import quantities
from treeq_export.report.report import STAGE_OF_SECTION, Report, judge
from treeq_export.report.summary import baseline_speedups, sort_worst_first
from treeq_export.run_folder import RunFolder

NUM_WORST = 5
_VERDICT_STYLES = {"passed": "bold green", "failed": "bold red", "incomplete": "bold yellow"}


def print_report(report: Report, console: Console) -> None:
    """Print a report."""
    _print_model(report, console)
    _print_search(report, console)
    if report.quality is not None:
        _print_quality(report.quality, console)
    if report.parity is not None:
        _print_parity(report.parity, console)
    if report.bench is not None:
        _print_bench(report.bench, console)
    for section in report.missing:
        command = f"treeq-export {STAGE_OF_SECTION[section]} --run {report.run}"
        text = f"{section}: not measured: run `{command}`"
        console.print(Text(text, style="yellow"), soft_wrap=True)
    _print_sizes(report, console)
    _print_gates(report, console)


def _make_table(title: str | None, first: str, *columns: str) -> Table:
    """Return a table: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _print_model(report: Report, console: Console) -> None:
    table = _make_table("Model and plan", "", "")
    table.show_header = False
    plan = report.plan
    _add(table, "model", plan.model.name)
    _add(table, "parameters", quantities.format_count(plan.model.num_parameters))
    _add(table, "quantized layers", quantities.format_count(len(plan.layers)))
    _add(table, "average weight bits", quantities.format_fixed(plan.average_weight_bits))
    _add(table, "average activation bits", quantities.format_fixed(plan.average_activation_bits))
    fraction = quantities.format_percent(plan.branch_parameter_fraction)
    _add(table, "branch parameters", fraction)
    console.print(table)


def _print_search(report: Report, console: Console) -> None:
    """Print a line on the search and one on training, where there is something to say."""
    search, finetune = report.search, report.finetune
    if search is not None and search.cost is not None:
        announced = ""
        if search.nodes:
            announced = f" ({quantities.format_count(search.cost.num_evaluations)} announced)"
        measured = search.num_measured + search.num_from_journal
        text = (
            f"Search: {search.strategy}, {search.cost.num_leaves} leaves, "
            f"{quantities.format_count(measured)} evaluations{announced} "
            f"in {quantities.format_seconds(search.seconds)}, "
            f"network MSE {quantities.format_number(search.network_mse, 3)}"
        )
        console.print(Text(text), soft_wrap=True)
    if finetune is not None:
        text = (
            f"Finetune: {finetune.mode}, {quantities.format_count(finetune.num_trained)} numbers, "
            f"{quantities.format_count(finetune.steps)} steps in "
            f"{quantities.format_seconds(finetune.seconds)}, held-out network MSE "
            f"{quantities.format_number(finetune.mse_before, 3)} -> "
            f"{quantities.format_number(finetune.mse_after, 3)}"
        )
        console.print(Text(text), soft_wrap=True)


def _print_quality(quality: QualityRecord, console: Console) -> None:
    title = f"Quality: {quality.num_samples} images, equal seeds"
    sides: dict[str, QualityScores] = {"full precision": quality.fp}
    errors: list[float | None] = [0.0]
    if quality.baseline is not None:
        sides[f"{quality.baseline.strategy} bits"] = quality.baseline.scores
        errors.append(quality.baseline.network_mse)
    sides["quantized"] = quality.quantized
    errors.append(quality.network_mse)
    table = _make_table(title, "", *sides)
    distances = [side.frechet_distance for side in sides.values()]
    shown = [_score(value, quantities.format_fixed(value, 3)) for value in distances]
    _add(table, "Frechet distance", *shown)
    accuracies = [side.class_accuracy for side in sides.values()]
    shown = [_score(value, quantities.format_percent(value)) for value in accuracies]
    _add(table, "class accuracy", *shown)
    psnrs = [side.psnr_db for side in list(sides.values())[1:]]
    shown = [_score(value, f"{quantities.format_db(value)} dB") for value in psnrs]
    _add(table, "PSNR to full precision", "", *shown)
    if quality.network_mse is not None:
        shown = [quantities.format_number(value, 3) for value in errors[1:]]
        _add(table, "network MSE, held out", "", *shown)
    console.print(table)


def _score(value: float | None, text: str) -> str:
    return "not measured" if value is None else text


def _print_parity(parity: ParityRecord, console: Console) -> None:
    for target in parity.targets:
        name = quantities.name_with_runtime(target.target, target.runtime)
        title = (
            f"Parity of {name} with the quantized PyTorch reference: "
            f"{quantities.format_db(target.sqnr_db)} dB end to end, "
            f"max abs error {quantities.format_number(target.max_abs_error)}, "
            f"{'passed' if target.passed else 'FAILED'}"
        )
        worst = sort_worst_first(target.layers)[:NUM_WORST]
        first = f"worst {len(worst)} of {len(target.layers)} layers"
        console.print(Text(title, style="bold"), soft_wrap=True)
        table = _make_table(None, first, "own SQNR, dB", "equal codes")
        for layer in worst:
            codes = quantities.format_percent(layer.equal_code_fraction, 2)
            _add(table, layer.name, quantities.format_db(layer.sqnr_db), codes)
        console.print(table)


def _print_bench(bench: BenchRecord, console: Console) -> None:
    table = _make_table("Speed", "target", "batch", "median, ms", "ratio", "95 % interval")
    speedups = {(s.target, s.batch): s for s in baseline_speedups(bench)}
    for row in bench.rows:
        cells = [row.target, str(row.batch), quantities.format_number(row.median_ms)]
        speedup = speedups.get((row.target, row.batch))
        if speedup is not None:
            low, high = (quantities.format_fixed(end) for end in (speedup.low, speedup.high))
            cells += [quantities.format_ratio(speedup.ratio), f"{low} .. {high}"]
        _add(table, *cells)
    console.print(table)
    if not bench.memory:
        return
    memory = _make_table("Memory", "target", "after load", "peak", "load")
    for entry in bench.memory:
        _add(
            memory,
            entry.target,
            quantities.format_bytes(entry.after_load_bytes),
            quantities.format_bytes(entry.peak_bytes),
            quantities.format_seconds(entry.load_s),
        )
    console.print(memory)


def _print_sizes(report: Report, console: Console) -> None:
    table = _make_table("Size", "graph", "bytes", "smaller")
    full = report.size["fp32_bytes"]
    for name, size in report.size.items():
        ratio = "" if name == "fp32_bytes" else quantities.format_ratio(full / size)
        _add(table, name.removesuffix("_bytes"), quantities.format_bytes(size), ratio)
    console.print(table)


def _print_gates(report: Report, console: Console) -> None:
    """Print a line for each group of gates that passed, and every gate of one that failed."""
    verdict = judge(report)
    if report.gates:
        table = _make_table("Gates", "gate", "measured", "limit", "")
        for group in report.gate_groups:
            if group.num_passed == len(group.gates):
                passed = Text(f"all {len(group.gates)} passed", "green")
                _add(table, group.title, "", "", passed)
                continue
            for gate in group.gates:
                result = Text("passed", "green") if gate.passed else Text("FAILED", "bold red")
                measured, limit = quantities.format_gate(gate.measured, gate.limit)
                sign = ">=" if gate.at_least else "<="
                _add(table, gate.name, measured, f"{sign} {limit}", result)
        console.print(table)
    names = f": {'; '.join(verdict.failed)}" if verdict.failed else ""
    console.print(
        Text(f"{verdict.headline}{names}", _VERDICT_STYLES[verdict.state]), soft_wrap=True
    )
    console.print(Text(f"Page: {report.run / RunFolder.PAGE}"), soft_wrap=True)
