"""What all records share: their form, gates, and how they are written and read."""

import json
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from treeq_export.artefacts import write_bytes
from treeq_export.errors import PlanError
from treeq_export.reading import read_record
from treeq_export.sealed import SEAL, is_sealed, seal

Model = TypeVar("Model", bound=BaseModel)


class Record(BaseModel):
    """Base of all records; non-finite numbers are written as JSON strings ("Infinity", "NaN")."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class SealedRecord(Record):
    """A record that carries the digest of its content (sealed.py).

    Attributes:
        sha256: Digest of the other fields; empty in a record that was never written.
    """

    sha256: str = ""

    def sealed(self) -> Self:
        """Return the record with its digest."""
        return self.model_copy(update={SEAL: seal(self._content())[SEAL]})

    def is_sealed(self) -> bool:
        """Whether the record is as it was written."""
        return is_sealed(self._content())

    def __eq__(self, other: object) -> bool:
        """Compare the content; one of the two may not have been written."""
        if not isinstance(other, SealedRecord) or type(other) is not type(self):
            return NotImplemented
        return self.model_dump(exclude={SEAL}) == other.model_dump(exclude={SEAL})

    __hash__ = Record.__hash__

    def _content(self) -> dict[str, Any]:
        return json.loads(self.model_dump_json())


class GateResult(Record):
    """One gate: what was measured against which limit.

    Attributes:
        name: What is limited, such as "portable end-to-end sqnr_db".
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
    """Write a record as JSON, atomically; one that can be sealed is.

    Raises:
        OutputError: The folder cannot be written to.
    """
    sealed = record.sealed() if isinstance(record, SealedRecord) else record
    write_bytes(path, (sealed.model_dump_json(indent=2) + "\n").encode())


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
