"""TensorRT or TensorRT-RTX, imported late and under one interface.

The RTX parser opens the bare name `libtensorrt_rtx.so`, while the wheel holds `.so.1`; where that
name is not found, the process ABORTS as soon as a plugin node is parsed. So a library of that name
(SONAME) which needs the real one is loaded before: 500 bytes of ELF without code, written here, so
that no compiler, no writable folder and no restart is needed. Whether the name can then be opened
is tried, and `require_parser` refuses to parse where it cannot.
"""

import ctypes
import importlib
import os
import platform
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from treeq_export.errors import RunnerError
from treeq_export.records.build import RuntimeName as RuntimeName

RUNTIMES: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
PARSER_OPENS = "libtensorrt_rtx.so"

# From elf.h.
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_ET_DYN, _PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 3, 1, 2, 0x6474E551
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB = 0, 1, 4, 5, 6
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14
_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES = 64, 56, 24
_READ_WRITE = 6
_PAGE_BYTES = 0x10000  # the largest of the two machines


@dataclass(frozen=True)
class Runtime:
    """A loaded runtime.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx".
        module: `tensorrt` or `tensorrt_rtx`.
        version: Version of the library, such as "1.7.1.116".
        parser_error: Why its ONNX parser would abort the process; None where it would not.
    """

    name: RuntimeName
    module: Any
    version: str
    parser_error: str | None = None


@cache
def load_runtime(name: RuntimeName) -> Runtime:
    """Import a runtime; nothing of it touches a GPU.

    Args:
        name: "tensorrt" or "tensorrt-rtx".

    Raises:
        RunnerError: The package is missing or broken; names the command that installs it.
    """
    try:
        module = importlib.import_module(_MODULES[name])
        version = str(module.__version__)
    except Exception as error:  # a broken wheel raises what it likes
        raise RunnerError(
            f"{name}: {_MODULES[name]} cannot be imported ({type(error).__name__}: {error}). "
            f"Run `pip install 'treeq-export[{_EXTRAS[name]}]'`."
        ) from error
    error = _cure_parser() if name == "tensorrt-rtx" else None
    return Runtime(name, module, version, error)


def require_parser(runtime: Runtime) -> None:
    """Check that the ONNX parser may be called.

    Raises:
        RunnerError: It would abort the process.
    """
    if runtime.parser_error is not None:
        raise RunnerError(
            f"{runtime.name} {runtime.version}: its ONNX parser would abort, since it cannot open "
            f"{PARSER_OPENS} ({runtime.parser_error}). Make a link of that name to "
            f"{PARSER_OPENS}.1 of the tensorrt_rtx_libs package in a folder of its own, and start "
            "again with that folder in LD_LIBRARY_PATH."
        )


def _cure_parser() -> str | None:
    """Make the name that the RTX parser opens known; return why that failed, if it did."""
    if sys.platform != "linux" or _opens(PARSER_OPENS) is None:
        return None
    try:
        _load_stub(PARSER_OPENS, _loaded_library(f"{PARSER_OPENS}."))
    except (OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return _opens(PARSER_OPENS)


def _opens(name: str) -> str | None:
    """Return why a library cannot be opened; None if it can."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return None


def _loaded_library(prefix: str, maps: Path = Path("/proc/self/maps")) -> str:
    """Return the path of the loaded library whose file name begins with `prefix`.

    Raises:
        OSError: None is loaded.
    """
    for line in maps.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if path.rpartition("/")[2].startswith(prefix):
            return path
    raise FileNotFoundError(f"no {prefix}* is loaded")


def _load_stub(soname: str, needed: str) -> None:
    """Load a library without code, from memory.

    Raises:
        OSError: The system does not load it.
        KeyError: An unknown machine.
    """
    data = stub_library(soname, needed, _ELF_MACHINES[platform.machine()])
    # Stays open: the loader knows libraries by their path, so the number must not come again.
    descriptor = os.memfd_create(soname)
    os.write(descriptor, data)
    ctypes.CDLL(f"/proc/self/fd/{descriptor}")


def stub_library(soname: str, needed: str, machine: int) -> bytes:
    """Return a 64-bit little-endian ELF library that only has a name and needs another one.

    Layout: header, program headers, hash table, symbol table (the null symbol), strings, dynamic
    section; one segment maps all of it at its file offsets.

    Args:
        soname: Name of the library.
        needed: Name or path of the library that the loader opens with it.
        machine: e_machine of elf.h.
    """
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    table = struct.pack("<4I", 1, 1, 0, 0)  # one bucket, one chain, both empty
    num_segments = 3
    hash_at = _HEADER_BYTES + num_segments * _SEGMENT_BYTES
    symbols_at = _align(hash_at + len(table))
    strings_at = symbols_at + _SYMBOL_BYTES
    dynamic_at = _align(strings_at + len(strings))
    entries = (
        (_DT_NEEDED, 2 + len(soname.encode())),
        (_DT_SONAME, 1),
        (_DT_HASH, hash_at),
        (_DT_STRTAB, strings_at),
        (_DT_SYMTAB, symbols_at),
        (_DT_STRSZ, len(strings)),
        (_DT_SYMENT, _SYMBOL_BYTES),
        (_DT_NULL, 0),
    )
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    size = dynamic_at + len(dynamic)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16s2HI3QI6H",
        *(identity, _ET_DYN, machine, 1, 0, _HEADER_BYTES, 0, 0),
        *(_HEADER_BYTES, _SEGMENT_BYTES, num_segments, 64, 0, 0),
    )
    segments = b"".join(
        struct.pack("<2I6Q", kind, _READ_WRITE, at, at, at, length, length, alignment)
        for kind, at, length, alignment in (
            (_PT_LOAD, 0, size, _PAGE_BYTES),
            (_PT_DYNAMIC, dynamic_at, len(dynamic), 8),
            (_PT_GNU_STACK, 0, 0, 16),  # without it the loader wants an executable stack
        )
    )
    parts = (
        (0, header + segments + table),
        (symbols_at, bytes(_SYMBOL_BYTES)),
        (strings_at, strings),
        (dynamic_at, dynamic),
    )
    data = bytearray(size)
    for at, part in parts:
        data[at : at + len(part)] = part
    return bytes(data)


def _align(offset: int) -> int:
    return (offset + 7) // 8 * 8
