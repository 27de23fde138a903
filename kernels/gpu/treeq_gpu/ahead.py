"""Compile the written list of kernels ahead of time, without a GPU.

    python -m treeq_gpu.ahead --out DIR [--arch sm_80,sm_90] [--only 'qlinear_w3_*'] [--jobs N]

writes DIR/<instantiation>.<architecture>.cubin and .ptx, and DIR/kernels.json, which says all that
a launch needs: symbol, shared memory, warps, and the parameters as the PTX has them, so the scratch
pointers that Triton appends are there too. Each kernel leaves a record, DIR/<...>.json, with a
digest of the sources: a second run compiles nothing, and an interrupted one goes on where it was.
"""

import argparse
import fnmatch
import hashlib
import importlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from treeq_export.ops import ActScale
from treeq_gpu.audit import audit_cubin
from treeq_gpu.instantiations import (
    ARCHITECTURES,
    DIVISIBLE_BY_16,
    INSTANTIATIONS,
    Instantiation,
)

MANIFEST = "kernels.json"
# Modules that decide what kernels.json holds.
SOURCES = ("ahead", "audit", "decode", "instantiations", "monarch", "qlinear", "quantize_tokens")
_PTX_TYPES = {"u64": "pointer", "b64": "pointer", "u32": "i32", "b32": "i32", "f32": "fp32"}


def source_of(instantiation: Instantiation) -> ASTSource:
    """Return what the compiler reads: function, types, constants and alignments."""
    module = importlib.import_module(f"treeq_gpu.{instantiation.module}")
    function = getattr(module, instantiation.kernel)
    params = instantiation.params
    signature = dict(params) | dict.fromkeys(instantiation.constants, "constexpr")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(params)
        if kind.startswith("*") or name in DIVISIBLE_BY_16
    }
    return ASTSource(
        fn=function, signature=signature, constexprs=instantiation.constants, attrs=attrs
    )


def source_digest() -> str:
    """Return a digest of all that decides the machine code beside an instantiation itself."""
    numbers = {scale.name: scale.number for scale in ActScale}
    digest = hashlib.sha256(f"{triton.__version__} {numbers}".encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def params_of(instantiation: Instantiation, ptx: str) -> list[list[str]]:
    """Return [name, type] of every parameter in the PTX, in order.

    Raises:
        RuntimeError: The PTX does not begin with the instantiation's own parameters.
    """
    entry = re.search(r"\.visible \.entry \w+\((.*?)\n\)", ptx, re.DOTALL)
    found = re.findall(r"\.param \.(\w+)", entry[1]) if entry else []
    kinds = [_PTX_TYPES[kind] for kind in found]
    own = [list(pair) for pair in instantiation.params]
    expected = ["pointer" if kind.startswith("*") else kind for _, kind in own]
    hidden = kinds[len(own) :]
    if kinds[: len(own)] != expected or any(kind != "pointer" for kind in hidden):
        raise RuntimeError(
            f"{instantiation.name}: the PTX has parameters {kinds}, expected {expected} and then "
            f"pointers only. Compare treeq_gpu/instantiations.py with the kernel's arguments."
        )
    return own + [[f"scratch{i}", "*i8"] for i in range(len(hidden))]


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def compile_kernel(name: str, architecture: str, out: Path) -> dict[str, Any]:
    """Compile one kernel into `out` and return its entry of kernels.json."""
    instantiation = INSTANTIATIONS[name]
    knobs.compilation.disable_line_info = True  # smaller files, the same code
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(
        source_of(instantiation), target=target, options=instantiation.options(architecture)
    )
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    stem = f"{name}.{architecture}"
    _write(out / f"{stem}.cubin", cubin)
    _write(out / f"{stem}.ptx", ptx.encode())
    audit = audit_cubin(out / f"{stem}.cubin", instantiation, architecture)
    entry = {
        "name": name,
        "function": compiled.metadata.name,
        "arch": architecture,
        "file": f"{stem}.cubin",
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "registers": audit.pop("registers"),
        "stack_bytes": audit.pop("stack_bytes"),
        "params": params_of(instantiation, ptx),
        "audit": audit,
    }
    record = json.dumps({"sources": source_digest(), "entry": entry})
    _write(out / f"{stem}.json", record.encode())
    return entry


def _known(out: Path, digest: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the entries whose record is of these sources and whose cubin is whole."""
    known = {}
    for path in out.glob("*.sm_*.json"):
        record = json.loads(path.read_text())
        entry = record["entry"]
        cubin = out / entry["file"]
        if record["sources"] != digest or not cubin.is_file():
            continue
        if hashlib.sha256(cubin.read_bytes()).hexdigest() == entry["sha256"]:
            known[entry["name"], entry["arch"]] = entry
    return known


def compile_all(
    out: Path, architectures: list[str], names: list[str], jobs: int = 0
) -> dict[str, Any]:
    """Compile kernels and write kernels.json; entries of others that are current stay in it.

    Args:
        out: Folder, made where it is missing.
        architectures: GPU architectures, such as "sm_90".
        names: Names of instantiations.
        jobs: Processes; 0 is one per CPU.

    Returns:
        What kernels.json holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    digest = source_digest()
    known = _known(out, digest)
    missing = [(n, a) for a in architectures for n in names if (n, a) not in known]
    if missing:
        workers = min(jobs or os.cpu_count() or 1, len(missing))
        with ProcessPoolExecutor(workers) as pool:
            done = pool.map(
                compile_kernel,
                [n for n, _ in missing],
                [a for _, a in missing],
                [out] * len(missing),
                chunksize=4,
            )
            known |= {(e["name"], e["arch"]): e for e in done}
    manifest = {
        "triton": triton.__version__,
        "kernels": [known[key] for key in sorted(known)],
    }
    _write(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m treeq_gpu.ahead", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES))
    parser.add_argument("--only", default="*", help="pattern of instantiations")
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args(argv)
    architectures = options.arch.split(",")
    unknown = sorted(set(architectures) - set(ARCHITECTURES))
    names = fnmatch.filter(INSTANTIATIONS, options.only)
    if unknown or not names:
        wrong = f"--arch {','.join(unknown)}" if unknown else f"--only {options.only}"
        known = ", ".join(ARCHITECTURES if unknown else INSTANTIATIONS)
        sys.stderr.write(f"ahead: {wrong} names nothing known. Choose from: {known}\n")
        return 2
    manifest = compile_all(options.out, architectures, names, options.jobs)
    sys.stdout.write(f"{len(manifest['kernels'])} kernels in {options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
