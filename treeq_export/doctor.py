"""What this machine has for treeq-export, what is missing, and the command that installs it."""

import importlib.util
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from treeq_export import __version__
from treeq_export.bench.environment import count_cores, read_cpu, version_of
from treeq_export.errors import RunnerError
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library, read_isa
from treeq_export.runners.ort_runner import check_version

# Module, package, what it is for, how to install it.
PACKAGES = (
    ("torch", "torch", "reference and export", "pip install treeq-export"),
    ("diffusers", "diffusers", "models and schedulers", "pip install treeq-export"),
    ("onnx", "onnx", "graphs", "pip install treeq-export"),
    ("onnxscript", "onnxscript", "export", "pip install treeq-export"),
    ("onnxruntime", "onnxruntime", "default runtime (CPU)", "pip install treeq-export"),
    ("tensorrt", "tensorrt", "TensorRT engines", "pip install 'treeq-export[tensorrt]'"),
    ("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX engines", "pip install 'treeq-export[rtx]'"),
    ("tritonclient", "tritonclient", "serving client", "pip install 'treeq-export[serve]'"),
    ("modelopt", "nvidia-modelopt", "peer to compare with", "pip install 'treeq-export[modelopt]'"),
)
REQUIRED = frozenset({"torch", "diffusers", "onnx", "onnxscript", "onnxruntime"})


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: Package or device.
        found: Version or description; None where it is missing.
        purpose: What it is for.
        remedy: The command that installs it; empty where there is none.
        required: Whether the CPU path needs it.
    """

    name: str
    found: str | None
    purpose: str
    remedy: str
    required: bool


def examine() -> list[Finding]:
    """Return what is installed and what is missing on this machine."""
    model, sets = read_cpu()
    findings = [
        Finding("treeq-export", __version__, "this tool", "", required=True),
        Finding("python", platform.python_version(), "interpreter", "", required=True),
        Finding("cpu", f"{model}, {count_cores()} cores: {' '.join(sets)}", "", "", required=True),
    ]
    for module, package, purpose, remedy in PACKAGES:
        found = None
        if importlib.util.find_spec(module) is not None:
            found = version_of(package) or version_of(f"{package}-gpu") or "unknown version"
        findings.append(Finding(package, found, purpose, remedy, required=module in REQUIRED))
    findings.append(_examine_kernels())
    findings.append(_examine_gpu())
    return findings


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
