"""What all records share: their form, gates, and how they are written and read."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from treeq_export.artefacts import write_bytes
from treeq_export.errors import PlanError
from treeq_export.reading import read_record

Model = TypeVar("Model", bound=BaseModel)


class Record(BaseModel):
    """Base of all records; non-finite numbers are written as JSON strings ("Infinity", "NaN")."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class GateResult(Record):
    """One gate: what was measured against which limit.

    Attributes:
        name: Such as "portable end-to-end sqnr_db".
        measured: The value.
        limit: The recipe's limit.
        at_least: Whether the value has to be at least (True) or at most (False) the limit.
        passed: Whether it is.
    """

    name: str
    measured: float
    limit: float
    at_least: bool
    passed: bool

    @classmethod
    def of(cls, name: str, measured: float, limit: float, *, at_least: bool) -> "GateResult":
        """Return the result of comparing; nan never passes."""
        passed = measured >= limit if at_least else measured <= limit
        return cls(name=name, measured=measured, limit=limit, at_least=at_least, passed=passed)


def save_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically.

    Raises:
        OutputError: The folder cannot be written to.
    """
    write_bytes(path, (record.model_dump_json(indent=2) + "\n").encode())


def load_record(path: Path, kind: type[Model], stage: str) -> Model:
    """Read a record.

    Args:
        path: The JSON file.
        kind: The record's class.
        stage: The stage that writes it, for the message.

    Raises:
        PlanError: Missing or malformed; names the stage to run first.
    """
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export {stage} --run {path.parent}` first.")
    return read_record(
        path,
        kind,
        error=PlanError,
        remedy=f"Run `treeq-export {stage} --run {path.parent}` again.",
    )
