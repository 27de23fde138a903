"""The gates of a run, read from its records."""

from collections.abc import Sequence
from pathlib import Path

from treeq_export.errors import GateError
from treeq_export.records.base import GateResult, load_record
from treeq_export.records.engines import ParityRecord
from treeq_export.records.quality import QualityRecord
from treeq_export.run_folder import RunFolder


def gate_results(
    run: Path, files: Sequence[str] = (RunFolder.PARITY, RunFolder.QUALITY)
) -> list[GateResult]:
    """Return the gates of the records that are there."""
    gates: list[GateResult] = []
    if RunFolder.PARITY in files and (run / RunFolder.PARITY).is_file():
        parity = load_record(run / RunFolder.PARITY, ParityRecord, "validate")
        gates += [gate for target in parity.targets for gate in target.gates]
    if RunFolder.QUALITY in files and (run / RunFolder.QUALITY).is_file():
        gates += load_record(run / RunFolder.QUALITY, QualityRecord, "evaluate").gates
    return gates


def check_gates(gates: list[GateResult]) -> None:
    """Check that all gates are met.

    Raises:
        GateError: Names the gates that are not, with what was measured.
    """
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        listed = "; ".join(
            f"{gate.name}: measured {gate.measured:.4g}, "
            f"required {'at least' if gate.at_least else 'at most'} {gate.limit:.4g}"
            for gate in failed
        )
        raise GateError(f"{len(failed)} of {len(gates)} gates are not met: {listed}.")
