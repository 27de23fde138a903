"""What a file may hold at most, whoever wrote it.

size       MAX_BYTES of a file, MAX_YAML_BYTES of YAML, MAX_HEADER_BYTES of a safetensors header
depth      MAX_DEPTH lists and mappings inside each other
numbers    MAX_NUMBER_CHARS characters each
count      MAX_NODES values, MAX_YAML_NODES in YAML, where an alias counts as what it stands for
keys       texts, each once in its mapping
texts      UTF-8 without NUL and without halves of surrogate pairs
"""

import re
from typing import Any

MAX_BYTES = 1 << 26
MAX_YAML_BYTES = 1 << 18
MAX_HEADER_BYTES = 1 << 25
MAX_DEPTH = 64
MAX_NUMBER_CHARS = 40
MAX_NODES = 4_000_000
MAX_YAML_NODES = 20_000

TOO_DEEP = f"more than {MAX_DEPTH} levels deep"

_UNWANTED = re.compile("[\0\ud800-\udfff]")


class RefusedError(ValueError):
    """A text goes beyond a limit; the message says which, without file and remedy."""


class NotTextError(RefusedError):
    """Bytes are not UTF-8."""


def decode(data: bytes) -> str:
    """Return a UTF-8 text without its byte order mark.

    Raises:
        NotTextError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise NotTextError(f"not UTF-8 at byte {fault.start}") from fault


def check_size(size: int, most: int) -> None:
    """Check the length of a file or text.

    Raises:
        RefusedError: It is longer than `most`.
    """
    if size > most:
        raise RefusedError(f"larger than {most} bytes, the most that is read")


def check_number(number: str) -> str:
    """Return the text of a number, which Python takes long to convert if it is long.

    Raises:
        RefusedError: It is too long.
    """
    if len(number) > MAX_NUMBER_CHARS:
        raise RefusedError(
            f"a number of {len(number)} characters ({number[:12]}...), expected at most "
            f"{MAX_NUMBER_CHARS}"
        )
    return number


def check_count(num_nodes: int, most: int) -> None:
    """Check the number of values.

    Raises:
        RefusedError: There are more than `most`.
    """
    if num_nodes > most:
        raise RefusedError(f"more than {most} values, the most that are read")


def check_value(value: Any, max_nodes: int) -> None:
    """Check depth, count and kinds of a parsed value; shared parts count each time.

    Raises:
        RefusedError: It is too deep or too large, or holds what JSON cannot say.
    """
    level, num_nodes = [value], 1
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                for key in node:
                    _check_text(key)
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
            else:
                _check_scalar(node)
            check_count(num_nodes + len(below), max_nodes)
        num_nodes += len(below)
        if not below:
            return
        level = below
    raise RefusedError(TOO_DEEP)


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif not isinstance(value, int | float | None):
        kind = type(value).__name__
        raise RefusedError(f"{value!s:.40}: a {kind}, expected a text or a number; quote it")


def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RefusedError(f"key {value!r:.40}: a {kind}, expected a text; quote it")
    if _UNWANTED.search(value):
        raise RefusedError(f"{value!r:.60}: holds a NUL or half of a character")
