"""Whether errors have grown since another run.

An error is compared as a ratio to its signal, 10^(-SQNR / 20). Above 100 dB it is the rounding of
float32, which differs between processors, and counts as 100 dB. Compared are the network's error,
each layer's own error, and what quantization itself costs each layer.
"""

import math
from pathlib import Path
from typing import NamedTuple

from treeq_export.errors import PlanError
from treeq_export.records import ParityRecord, load_record
from treeq_export.run_folder import RunFolder
from treeq_export.validate.junit import NETWORK

_ROUNDING_DB = 100.0


class Growth(NamedTuple):
    """What differs between two runs.

    Attributes:
        faults: Errors that grew too much, in words, by target and layer or "network".
        missing: Layers and networks that only one of the runs has, in words.
    """

    faults: dict[tuple[str, str], list[str]]
    missing: list[str]


def load_earlier(run: Path, batch_size: int, seed: int) -> ParityRecord:
    """Read what validate has measured in another run.

    Args:
        run: The run folder.
        batch_size: Images per batch in the run that it will be compared with.
        seed: Seed of the inputs there.

    Raises:
        PlanError: The run was not validated, its record is malformed, or it has other inputs.
    """
    record = load_record(run / RunFolder.PARITY, ParityRecord, "validate")
    for key, expected in (("batch_size", batch_size), ("seed", seed)):
        received = getattr(record, key)
        if received != expected:
            raise PlanError(
                f"{run / RunFolder.PARITY}: received {key} {received}, expected {expected} as in "
                "this run. "
                "Set validate.batch_size and seed alike, and validate the other run again."
            )
    return record


def find_growth(record: ParityRecord, earlier: ParityRecord, max_growth: float) -> Growth:
    """Compare the errors of two runs.

    Args:
        record: The run that is judged.
        earlier: The run that it is compared with.
        max_growth: Largest share by which an error may grow; 0.1 is a tenth.

    Returns:
        What has grown, and what cannot be compared.
    """
    now, before = _errors(record), _errors(earlier)
    faults: dict[tuple[str, str], list[str]] = {}
    for key, errors in now.items():
        for what, sqnr in errors.items():
            old = before.get(key, {}).get(what, sqnr)
            growth = _growth_of(sqnr, old)
            if not growth <= max_growth:
                faults.setdefault(key, []).append(
                    f"{what} has grown by {growth:.1%}, from {old:.2f} dB to {sqnr:.2f} dB; "
                    f"at most {max_growth:.1%} is allowed"
                )
    missing = [f"{_named(key)}: only in the other run" for key in before if key not in now]
    missing += [f"{_named(key)}: not in the other run" for key in now if key not in before]
    return Growth(faults, missing)


def describe_faults(growth: Growth) -> list[str]:
    """Return one line for each layer or network whose errors have grown."""
    return [f"{_named(key)}: {'; '.join(lines)}" for key, lines in growth.faults.items()]


def _growth_of(sqnr_db: float, old_db: float) -> float:
    """Return the share by which an error has grown; nan is worse than any number but nan."""
    now, before = min(sqnr_db, _ROUNDING_DB), min(old_db, _ROUNDING_DB)
    if now == before or math.isnan(before):
        return 0.0
    return 10 ** ((before - now) / 20) - 1


def _errors(record: ParityRecord) -> dict[tuple[str, str], dict[str, float]]:
    """Return SQNR in dB by target and layer or network, then by what is measured."""
    errors: dict[tuple[str, str], dict[str, float]] = {}
    for target in record.targets:
        errors[target.target, NETWORK] = {"end-to-end error": target.sqnr_db}
        for layer in target.layers:
            errors[target.target, layer.name] = {
                "own error": layer.sqnr_db,
                "quantization error": layer.quantization_sqnr_db,
            }
    return errors


def _named(key: tuple[str, str]) -> str:
    return ": ".join(key)
