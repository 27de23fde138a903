"""Reading JSON, as it is or into a pydantic model."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from treeq_export.errors import TreeqError
from treeq_export.reading.files import read_bytes
from treeq_export.reading.limits import (
    MAX_BYTES,
    MAX_NODES,
    TOO_DEEP,
    NotTextError,
    RefusedError,
    check_count,
    check_number,
    check_size,
    check_value,
    decode,
)

T = TypeVar("T")


def read_json(
    path: Path, *, error: type[TreeqError], remedy: str, max_bytes: int = MAX_BYTES
) -> Any:
    """Read a JSON file.

    Raises:
        TreeqError: It cannot be read, is not JSON or goes beyond a limit; of the class `error`.
    """
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=max_bytes)
    return parse_json(data, path, error=error, remedy=remedy, max_bytes=max_bytes)


def read_object(
    path: Path, *, error: type[TreeqError], remedy: str, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON file whose value is an object; the errors are those of `read_json`."""
    value = read_json(path, error=error, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise error(f"{path}: received a {type(value).__name__}, expected an object. {remedy}")
    return value


def read_record(path: Path, kind: type[T], *, error: type[TreeqError], remedy: str) -> T:
    """Read a JSON file into a pydantic model, or another type that pydantic can check.

    Raises:
        TreeqError: `read_json` fails, or a key does not fit the model; of the class `error`.
    """
    data = read_bytes(path, error=error, remedy=remedy)
    return parse_record(data, kind, path, error=error, remedy=remedy)


def parse_json(
    data: bytes | str,
    where: str | Path,
    *,
    error: type[TreeqError],
    remedy: str,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Parse JSON; NaN and Infinity are accepted as Python writes them.

    Args:
        data: The text.
        where: What the errors call it.
        error: Class of the errors.
        remedy: A sentence that ends every error.
        max_bytes: Largest size.

    Raises:
        TreeqError: Not JSON, or beyond a limit; of the class `error`.

    Example:
        >>> parse_json('{"bits": 4}', "x.json", error=TreeqError, remedy="Write it again.")
        {'bits': 4}
    """
    try:
        check_size(len(data), max_bytes)
        text = data if isinstance(data, str) else decode(data)
        check_count(sum(map(text.count, ",[{")), MAX_NODES)  # before they take memory
        value = json.loads(text, parse_int=_integer, parse_float=_number, object_pairs_hook=_unique)
        check_value(value, MAX_NODES)
    except json.JSONDecodeError as fault:
        raise error(f"{where}: not JSON ({fault}). {remedy}") from fault
    except NotTextError as fault:
        raise error(f"{where}: not JSON ({fault}). {remedy}") from fault
    except RefusedError as fault:
        raise error(f"{where}: {fault}. {remedy}") from fault
    except RecursionError as fault:
        raise error(f"{where}: {TOO_DEEP}. {remedy}") from fault
    return value


def parse_record(
    data: bytes | str,
    kind: type[T],
    where: str | Path,
    *,
    error: type[TreeqError],
    remedy: str,
) -> T:
    """Parse JSON into a pydantic model, or another type that pydantic can check.

    Raises:
        TreeqError: `parse_json` fails, or a key does not fit the model; of the class `error`.
    """
    parse_json(data, where, error=error, remedy=remedy)
    try:
        return TypeAdapter(kind).validate_json(data if isinstance(data, str) else decode(data))
    except ValidationError as fault:
        raise error(f"{where}: {first_problem(fault)} {remedy}") from fault


def first_problem(fault: ValidationError) -> str:
    """Say the first problem of a value in one sentence: key, what is wrong, what was received."""
    first = fault.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{place}: {first['msg']} (received {first['input']!r:.60})."


def _integer(text: str) -> int:
    return int(check_number(text))


def _number(text: str) -> float:
    return float(check_number(text))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RefusedError(f"key {twice!r:.60} stands twice in one mapping")
    return value
