"""What this machine has for treeq-export, what is missing, and the command that installs it.

Whether our plugins can be registered in a runtime is tried in a process of its own with a time
limit, because TensorRT may abort; these processes run while the rest is looked at.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from treeq_export import __version__
from treeq_export.children import python_child
from treeq_export.environment import VNNI, available_cpus, read_cpu, version_of
from treeq_export.errors import RunnerError
from treeq_export.ops import PLUGINS
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library, read_isa
from treeq_export.runners.cubin_launcher import read_manifest
from treeq_export.runners.ort_runner import check_version
from treeq_export.runners.products import products_saturate
from treeq_export.runners.tensorrt_plugin import KERNELS_VARIABLE
from treeq_export.runners.tensorrt_runner import PLUGIN_LIBRARY

# Module, package, what it is for, how to install it.
PACKAGES = (
    ("torch", "torch", "reference and export", "pip install treeq-export"),
    ("diffusers", "diffusers", "models and schedulers", "pip install treeq-export"),
    ("onnx", "onnx", "graphs", "pip install treeq-export"),
    ("onnxscript", "onnxscript", "export", "pip install treeq-export"),
    ("onnxruntime", "onnxruntime", "default runtime (CPU)", "pip install treeq-export"),
    ("tensorrt", "tensorrt", "TensorRT engines", "pip install 'treeq-export[tensorrt]'"),
    ("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX engines", "pip install 'treeq-export[rtx]'"),
    ("polygraphy", "polygraphy", "building engines", "pip install 'treeq-export[rtx]'"),
    ("cuda.bindings", "cuda-python", "running engines", "pip install 'treeq-export[rtx]'"),
    ("triton", "triton", "GPU kernels", "pip install 'treeq-export[gpu]'"),
    ("tritonclient", "tritonclient", "serving client", "pip install 'treeq-export[serve]'"),
    ("modelopt", "nvidia-modelopt", "peer to compare with", "pip install 'treeq-export[modelopt]'"),
)
RUNTIME_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
REQUIRED = frozenset({"torch", "diffusers", "onnx", "onnxscript", "onnxruntime"})

REGISTRATION_TIMEOUT_S = 30.0
_REGISTER = "treeq_export.runners.registration"

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_COMMAND_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: Package or device.
        found: Version or description; None where it is missing.
        purpose: What it is for.
        remedy: The command that installs it; empty where there is none.
        required: Whether the CPU path needs it.
        problem: Why it cannot be used though it is there; empty where it can, or is missing.
    """

    name: str
    found: str | None
    purpose: str
    remedy: str
    required: bool
    problem: str = ""


def examine() -> list[Finding]:
    """Return what is installed and what is missing on this machine."""
    with registrations() as children:
        findings = _examine_packages()
        findings += [_examine_products(), _examine_kernels()]
        findings += [_examine_cubins(), _examine_plugin_library()]
        findings += [_examine_nvcc(), _examine_driver(), _examine_gpu()]
        return findings + [_examine_registration(name, child) for name, child in children.items()]


def _examine_packages() -> list[Finding]:
    """Say what of Python is there."""
    (model, sets), cores = read_cpu(), available_cpus()
    findings = [
        Finding("treeq-export", __version__, "this tool", "", required=True),
        Finding("python", platform.python_version(), "interpreter", "", required=True),
        Finding("cpu", f"{model}, {cores} cores: {' '.join(sets)}", "", "", required=True),
    ]
    for module, package, purpose, remedy in PACKAGES:
        found, problem = None, ""
        if _is_installed(module):
            found = version_of(package) or version_of(f"{package}-gpu") or "unknown version"
            problem = _find_age(package, found)
        findings.append(
            Finding(
                package,
                None if problem else found,
                purpose,
                remedy,
                required=module in REQUIRED,
                problem=problem,
            )
        )
    return findings


def _find_age(package: str, found: str) -> str:
    """Say that a version is lower than this package's metadata allows; "" if it is not."""
    try:
        wanted = requires("treeq-export") or []
    except PackageNotFoundError:  # run from a checkout
        return ""
    floors = [re.match(rf"{package}>=([\d.]+)", requirement) for requirement in wanted]
    floor = next((match[1] for match in floors if match), "0")
    return f"version {found}, expected at least {floor}" if _parts(found) < _parts(floor) else ""


def _parts(version: str) -> list[int]:
    """Return the numbers that a version begins with; those of an unknown one are above all."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in numbers[0].split(".")] if numbers else [sys.maxsize]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False


def _examine_products() -> Finding:
    """Say whether ONNX Runtime's products of UINT8 and INT8 are exact here, by trying one."""
    found, problem = None, ""
    if _is_installed("onnxruntime"):
        unit = "no VNNI" if VNNI.isdisjoint(read_cpu()[1]) else "VNNI"
        try:
            saturates = products_saturate()
        except Exception as error:  # a runtime that cannot even multiply
            problem = f"ONNX Runtime cannot multiply: {' '.join(str(error).split())[:300]}"
        else:
            found = f"{'saturate' if saturates else 'exact'} in ONNX Runtime ({unit})"
    purpose = (
        "UINT8 x INT8 products of graphs made elsewhere, with 8-bit weights; "
        "compiled graphs are exact everywhere"
    )
    return Finding("8-bit products", found, purpose, "", required=False, problem=problem)


def _examine_kernels() -> Finding:
    """Say which instruction set the CPU kernels use, and where the custom-op library lies."""
    found = None
    library = find_library(ORT_LIBRARY)
    if library is not None:
        with suppress(RunnerError):
            check_version(library)
            found = f"{read_isa()}, {library}"
    remedy = "pip install --force-reinstall treeq-export"
    purpose = "packed low bits in ONNX Runtime; TREEQ_ISA forces an instruction set"
    return Finding("cpu kernels", found, purpose, remedy, required=False)


def _examine_cubins() -> Finding:
    """Say which GPU kernels are compiled ahead, for engines with the plugins in Python."""
    purpose = "machine code of the GPU kernels, for the plugins in Python"
    remedy = (
        f"python -m treeq_gpu.ahead --out ~/.cache/treeq/kernels && "
        f"export {KERNELS_VARIABLE}=~/.cache/treeq/kernels"
    )
    found, problem = None, ""
    folder = os.environ.get(KERNELS_VARIABLE)
    if folder:
        manifest = Path(folder) / "kernels.json"
        try:
            kernels = read_manifest(Path(folder))
            architectures = sorted({kernel.arch for kernel in kernels})
            found = f"{len(kernels)} for {', '.join(architectures)}, {folder}"
        except RunnerError:
            problem = f"{manifest} is missing or malformed"
    return Finding("gpu kernels", found, purpose, remedy, required=False, problem=problem)


def _examine_plugin_library() -> Finding:
    """Say where the C++ plugins lie; without them the classes in Python are registered."""
    library = find_library(PLUGIN_LIBRARY)
    remedy = (
        "TENSORRT_ROOT=/path/to/TensorRT CUDA_HOME=/usr/local/cuda "
        "pip install --force-reinstall --no-deps treeq-export"
    )
    found = None if library is None else str(library)
    return Finding(PLUGIN_LIBRARY, found, "plugins for hosts without Python", remedy, False)


def _examine_nvcc() -> Finding:
    """Say which CUDA compiler is in PATH."""
    found, problem = None, ""
    program = shutil.which("nvcc")
    if program is not None:
        text = _output_of([program, "--version"])
        release = re.search(r"release ([\d.]+)", text)
        found = f"{release[1]}, {program}" if release else None
        problem = "" if release else f"{program} does not say its version"
    remedy = "conda install -c nvidia cuda-nvcc"
    purpose = "the int4 kernel of experimental/; nothing else needs it"
    return Finding("nvcc", found, purpose, remedy, required=False, problem=problem)


def _examine_driver() -> Finding:
    """Say which NVIDIA driver is loaded."""
    found = None
    if _DRIVER_FILE.is_file():
        release = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", _DRIVER_FILE.read_text())
        found = release[1] if release else "unknown version"
    elif shutil.which("nvidia-smi") is not None:  # where /proc is not the host's
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        text = _output_of(command).strip()
        found = text if re.fullmatch(r"[\d.]+", text) else None
    remedy = "apt-get install nvidia-driver  (Debian; else https://www.nvidia.com/drivers)"
    return Finding("nvidia driver", found, "running GPU engines", remedy, required=False)


def _output_of(command: list[str]) -> str:
    """Return what a command prints, "" where it fails or takes too long."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True
        ).stdout
    return ""


@contextmanager
def registrations() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """Yield, by installed runtime, a process that registers our plugins in it."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                python_child(
                    _REGISTER, name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
            for name, module in RUNTIME_MODULES.items()
            if _is_installed(module)
        }


def _examine_registration(
    name: str, child: "subprocess.Popen[str]", timeout_s: float = REGISTRATION_TIMEOUT_S
) -> Finding:
    """Say whether our plugins can be registered in a runtime, and where they come from."""
    found, problem = None, ""
    try:
        source, complaint = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        problem = f"no answer in {timeout_s:g} s"
    else:
        if child.returncode == 0:
            found = f"{', '.join(op.name for op in PLUGINS)} from {source}"
        else:
            lines = complaint.strip().splitlines() or ["no message"]
            problem = f"status {child.returncode}: {lines[-1].strip()[:300]}"
    package = "tensorrt" if name == "tensorrt" else "rtx"
    remedy = f"pip install --force-reinstall 'treeq-export[{package}]'"
    purpose = "packed low bits in engines"
    return Finding(f"plugins in {name}", found, purpose, remedy, required=False, problem=problem)


def _examine_gpu() -> Finding:
    found = None
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            found = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    return Finding("gpu", found, "GPU engines; the CPU path needs none", "", required=False)


def is_healthy(findings: list[Finding]) -> bool:
    """Whether everything that the CPU path needs is there."""
    return all(finding.found is not None for finding in findings if finding.required)


def findings_to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings for `--json`."""
    return [asdict(finding) for finding in findings]
