"""Views of a run's records: report.json for programs, report.html and the terminal for people."""

from treeq_export.artefacts import write_bytes, write_json
from treeq_export.report.html import render_html
from treeq_export.report.report import Report, make_report
from treeq_export.report.summary import report_to_json
from treeq_export.report.terminal import print_report
from treeq_export.run_folder import RunFolder

__all__ = ["Report", "make_report", "print_report", "report_to_json", "write_report"]


def write_report(report: Report) -> None:
    """Write report.html, then report.json, into the run folder.

    Raises:
        OutputError: The folder cannot be written to.
    """
    write_bytes(report.run / RunFolder.PAGE, render_html(report).encode())
    write_json(report.run / RunFolder.REPORT, report_to_json(report))
