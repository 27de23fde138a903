"""Reading safetensors files, for any framework; this package imports none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from treeq_export.errors import TreeqError
from treeq_export.reading.files import open_file
from treeq_export.reading.json_files import parse_json
from treeq_export.reading.limits import MAX_HEADER_BYTES

Framework = Literal["numpy", "pt"]

_SIZE_FIELD = 8  # bytes before the header


class TensorFile:
    """An open safetensors file.

    Attributes:
        header: {name: {"dtype", "shape", "data_offsets"}} of its tensors, in the file's order.
        metadata: The texts that the file carries beside its tensors.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        reader: Any,
        *,
        error: type[TreeqError],
        remedy: str,
    ) -> None:
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.header = header
        self._path, self._reader = path, reader
        self._error, self._remedy = error, remedy

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.header[name]["shape"])

    def get(self, name: str) -> Any:
        """Read one tensor.

        Returns:
            An array or tensor of the framework that the file was opened for.

        Raises:
            TreeqError: The file has no such tensor, or one that the framework cannot hold.
        """
        if name not in self.header:
            raise self._error(f"{self._path}: {name}: missing. {self._remedy}")
        try:
            return self._reader.get_tensor(name)
        except MemoryError:
            raise
        except Exception as fault:
            kind = self.header[name]["dtype"]
            raise self._error(
                f"{self._path}: {name} ({kind}): cannot be read ({fault}). {self._remedy}"
            ) from fault


@contextmanager
def open_safetensors(
    path: Path, *, error: type[TreeqError], remedy: str, framework: Framework = "numpy"
) -> Iterator[TensorFile]:
    """Open a safetensors file; its tensors are read when asked for.

    Args:
        path: The file.
        error: Class of the errors.
        remedy: A sentence that ends every error.
        framework: Whose arrays the tensors become.

    Yields:
        The open file.

    Raises:
        TreeqError: It cannot be read, or is no complete safetensors file; of the class `error`.
    """
    header, size = _read_header(path, error=error, remedy=remedy)
    try:
        reader: Any = safe_open(path, framework=framework)
    except (SafetensorError, OSError) as fault:
        raise error(
            f"{path}: {size} bytes that are no complete safetensors file ({fault}). {remedy}"
        ) from fault
    with reader:
        yield TensorFile(path, header, reader, error=error, remedy=remedy)


def load_safetensors(
    path: Path, *, error: type[TreeqError], remedy: str, framework: Framework = "numpy"
) -> dict[str, Any]:
    """Read all tensors of a safetensors file; arguments and errors as of `open_safetensors`."""
    with open_safetensors(path, error=error, remedy=remedy, framework=framework) as file:
        return {name: file.get(name) for name in file.header}


def _read_header(path: Path, *, error: type[TreeqError], remedy: str) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file; the data are only counted.

    Returns:
        {name: {"dtype", "shape", "data_offsets"}}, with "__metadata__" where the file has it; and
        the size of the file in bytes.

    Raises:
        TreeqError: It cannot be read, or is cut short or damaged; of the class `error`.
    """
    with open_file(path, error=error, remedy=remedy) as file:
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        size = int.from_bytes(file.read(_SIZE_FIELD), "little")
        complete = 0 < size <= min(total - _SIZE_FIELD, MAX_HEADER_BYTES)
        data = file.read(size) if complete else b""
    if not complete:
        raise error(
            f"{path}: {total} bytes that are no complete safetensors file (its header would take "
            f"{size}). {remedy}"
        )
    header = parse_json(data, f"{path}: header", error=error, remedy=remedy)
    if not isinstance(header, dict):
        raise error(f"{path}: header: received a {type(header).__name__}. {remedy}")
    return header, total
