"""Runs a command at native speed as on a processor with AVX2 but without AVX-512, VNNI and AMX.

    python tests/emulate/without_avx512.py CMD...

The command finds a copy of this Python's ONNX Runtime in which every `cpuid` instruction is a trap;
a preloaded library answers the trap without the bits of AVX-512, AVX-VNNI and AMX. So ONNX Runtime
picks its kernels for AVX2, which saturate in uint8 x int8 products. The kernels of treeq-export,
PyTorch, oneDNN and OpenBLAS are told by environment variables (TREEQ_ISA and others). What the
command starts inherits all of it. Only the loops of numpy keep AVX-512.

In a test: `subprocess.run([sys.executable, ...], env=environment())`. It needs x86-64 Linux, `cc`
and `objdump`; `missing()` says what is not there. The copy is made once, in build/emulate.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "emulate"
CPUID = b"\x0f\xa2"
TRAP = b"\xcc\x90"  # int3; nop: the handler returns behind the int3
LOAD_SEGMENT = 1
CHOICES = {
    "TREEQ_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}


def missing() -> str | None:
    """Return what this machine lacks for the emulation, or None."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the emulation needs x86-64 Linux"
    absent = [name for name in ("cc", "objdump") if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def find_cpuid(library: Path) -> list[int]:
    """Return the addresses of all `cpuid` instructions, by disassembly."""
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"^\s*([0-9a-f]+):\s+cpuid\b", done.stdout, re.MULTILINE)
    return [int(address, 16) for address in found]


def file_offset(data: bytes | bytearray, address: int) -> int:
    """Return where the byte at an address of a 64-bit ELF file lies in the file."""
    table, size, count = (
        struct.unpack_from(kind, data, at)[0] for kind, at in (("<Q", 32), ("<H", 54), ("<H", 56))
    )
    for i in range(count):
        kind, _, offset, begin, _, length = struct.unpack_from("<IIQQQQ", data, table + i * size)
        if kind == LOAD_SEGMENT and begin <= address < begin + length:
            return offset + address - begin
    raise ValueError(f"address {address:#x} is in no segment")


def trap_cpuid(source: Path, target: Path) -> int:
    """Write a copy of a library with traps in place of `cpuid`; return how many there are."""
    addresses = find_cpuid(source)
    if not addresses:
        target.symlink_to(source)
        return 0
    data = bytearray(source.read_bytes())
    for address in addresses:
        at = file_offset(data, address)
        if data[at : at + 2] != CPUID:
            raise ValueError(f"{source.name}: no cpuid at {address:#x}")
        data[at : at + 2] = TRAP
    target.write_bytes(data)
    return len(addresses)


def copy_package(package: Path, target: Path) -> None:
    """Shadow a package by links, its shared libraries by copies with traps."""
    count = 0
    for path in sorted(package.rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        shadow = target / path.relative_to(package)
        shadow.parent.mkdir(parents=True, exist_ok=True)
        if ".so" in path.suffixes:
            count += trap_cpuid(path, shadow)
        else:
            shadow.symlink_to(path)
    if not count:
        raise ValueError(f"{package} asks the processor nothing; there is nothing to hide")


def prepare() -> Path:
    """Return the folder with the shadow package and hide_avx512.so, made at the first call."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("onnxruntime is not installed")
    package = Path(spec.origin).parent.resolve()
    digest = hashlib.sha256(str(package).encode())
    for path in (Path(__file__), HERE / "hide_avx512.c"):
        digest.update(path.read_bytes())
    for path in sorted(package.rglob("*.so*")):
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    folder = CACHE / digest.hexdigest()[:16]
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".partial-") as partial:
        made = Path(partial) / "made"
        copy_package(package, made / "python" / "onnxruntime")
        source = str(HERE / "hide_avx512.c")
        command = ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o"]
        subprocess.run([*command, str(made / "hide_avx512.so")], check=True)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment, os.environ by default, in which AVX-512 is hidden.

    A variable of CHOICES that is set already keeps its value.
    """
    env = dict(os.environ if base is None else base)
    folder = prepare()
    for name, first in (
        ("PYTHONPATH", folder / "python"),
        ("LD_PRELOAD", folder / "hide_avx512.so"),
    ):
        env[name] = os.pathsep.join([str(first), *filter(None, [env.get(name)])])
    return CHOICES | env


def main() -> None:
    """Replace this process by the command."""
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/emulate/without_avx512.py CMD...")
    if reason := missing():
        sys.exit(f"without_avx512: {reason}")
    os.execvpe(sys.argv[1], sys.argv[1:], environment())


if __name__ == "__main__":
    main()
