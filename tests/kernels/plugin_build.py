"""Builds libtreeq_plugins.so for tests, with a host that plays TensorRT and a driver that records.

TENSORRT_ROOT names one or more folders of TensorRT headers, separated as in PATH.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeq_gpu.instantiations import INSTANTIATIONS

from tests.required import skip_or_fail

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "tensorrt"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def header_roots() -> list[str]:
    """Folders of TensorRT headers; [""] where there are none."""
    return os.environ.get("TENSORRT_ROOT", "").split(os.pathsep)


def require_headers(root: str) -> str:
    """Return `root`; skip, or fail where TREEQ_REQUIRE names tensorrt-headers, without headers."""
    places = [Path(root) / "include", Path(root)] if root else []
    if not any((place / "NvInferRuntime.h").is_file() for place in places):
        where = root or "TENSORRT_ROOT, which is not set"
        skip_or_fail("tensorrt-headers", f"no NvInferRuntime.h in {where}")
    return root


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


def shared_bytes(name: str, architecture: str) -> int:
    """Some number that tells kernels and architectures apart, around the limit of 48 KiB."""
    return (int(hashlib.sha256(f"{name}{architecture}".encode()).hexdigest()[:4], 16) % 96) * 1024


def make_cubins(folder: Path) -> Path:
    """Write a kernels.json of all instantiations, with texts that fake_cuda.cpp takes as cubins."""
    folder.mkdir()
    kernels = []
    for name, arch in itertools.product(INSTANTIATIONS, ARCHITECTURES):
        one = INSTANTIATIONS[name]
        params = [*map(list, one.params), ["scratch0", "*i8"], ["scratch1", "*i8"]]
        sizes = "".join("8" if kind.startswith("*") else "4" for _, kind in params)
        data = f"{name} {arch} {sizes}\n\0".encode()
        path = folder / f"{name}.{arch}.cubin"
        path.write_bytes(data)
        kernels.append({
            "name": name, "function": one.kernel, "arch": arch, "file": path.name,
            "sha256": hashlib.sha256(data).hexdigest(), "num_warps": one.num_warps,
            "shared_bytes": shared_bytes(name, arch), "params": params,
        })  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps({"kernels": kernels}))
    return folder


def configure(build: Path, root: str, *options: str) -> str:
    """Configure kernels/ into `build` and return what CMake said."""
    environment = {key: value for key, value in os.environ.items() if key != "TENSORRT_ROOT"}
    return run(
        "cmake", "-S", ROOT / "kernels", "-B", build, "-DTREEQ_WERROR=ON", "-DTREEQ_VERSION=0",
        f"-DTENSORRT_ROOT={root}", f"-DPython_EXECUTABLE={sys.executable}", *options,
        env=environment,
    ).stdout  # fmt: skip


def build_plugins(build: Path) -> Path:
    run("cmake", "--build", build, "--target", "treeq_plugins", "--parallel", "2")
    return build / "tensorrt" / "libtreeq_plugins.so"


@dataclass(frozen=True)
class Built:
    """The library and the host that were built with one TensorRT's headers."""

    library: Path
    host: Path
    cuda: Path
    major: int = 0

    def enqueue(self, text: str, log: Path, **fake: object) -> tuple[dict[str, Any], list[Any]]:
        """Run one description in the host; return its answer and the calls of the driver."""
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(self.cuda.parent),
            "TREEQ_FAKE_LOG": str(log),
        }
        settings = {"CAPABILITY": 90, "SMS": 132} | fake
        environment |= {f"TREEQ_FAKE_{key}": str(value) for key, value in settings.items()}
        answer = run(self.host, self.library, input=f"{text}\nrun\n", env=environment).stdout
        calls = log.read_text().splitlines() if log.is_file() else []
        return json.loads(answer), [json.loads(line) for line in calls]


def read_major(root: str) -> int:
    """Return the major version of the headers in `root`."""
    (header,) = [*Path(root).glob("include/NvInferVersion.h"), *Path(root).glob("NvInferVersion.h")]
    names = r"#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)"
    found = re.search(names, header.read_text())
    assert found, header
    return int(found[1])


def build_all(root: str, cubins: Path, folder: Path) -> Built:
    """Build the library and what tests it against the headers in `root`."""
    said = configure(folder, root, f"-DTREEQ_CUBIN_DIR={cubins}")
    assert "treeq: TensorRT plugins with" in said
    fake = folder / "fake" / "libcuda.so.1"
    made = Built(build_plugins(folder), folder / "host", fake, read_major(root))
    made.cuda.parent.mkdir()
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O0"]
    run("g++", *flags, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", made.cuda,
        SOURCES / "fake_cuda.cpp")  # fmt: skip
    includes = [f"-isystem{root}/include", f"-isystem{root}", f"-isystem{CUDA_INCLUDE}"]
    run("g++", *flags, *includes, "-o", made.host, SOURCES / "host.cpp", "-ldl")
    return made
