"""Views of a run's records: report.json for programs, report.html and the terminal for people."""

from pathlib import Path

from treeq_export.artefacts import write_bytes, write_json
from treeq_export.recipe import Recipe
from treeq_export.report.evidence import read_evidence
from treeq_export.report.html import render_html
from treeq_export.report.summary import HTML_FILE, REPORT_FILE, Report, report_to_json, summarize
from treeq_export.report.terminal import print_report

__all__ = ["Report", "make_report", "print_report", "report_to_json", "write_report"]


def make_report(
    run: Path, *, stages: dict[str, float], recipe: Recipe, commands: list[str]
) -> Report:
    """Return the report of a run without writing it; see `write_report`.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed.
    """
    return summarize(read_evidence(run, recipe, commands), stages)


def write_report(
    run: Path, *, stages: dict[str, float], recipe: Recipe, commands: list[str]
) -> Report:
    """Write report.html, then report.json, from the records in a run folder.

    Args:
        run: The run folder; plan.json and compile.json have to be there, the records of validate,
            bench and evaluate may be missing.
        stages: Seconds that each stage took.
        recipe: The recipe of the run.
        commands: Command lines that repeat the run.

    Returns:
        What report.json holds, with the records it was made of.

    Raises:
        PlanError: The plan or compile.json is missing, or a record is malformed.
        OutputError: The folder cannot be written to.
    """
    report = make_report(run, stages=stages, recipe=recipe, commands=commands)
    write_bytes(run / HTML_FILE, render_html(report).encode())
    write_json(run / REPORT_FILE, report_to_json(report))
    return report
