"""Who runs a compiled graph.

A compiled target may be run in two ways, each of which is validated and timed:

    ort         `treeq` ops in our custom-op library
    ort_body    the same file without it: ONNX Runtime takes the function bodies

The targets of TensorRT are validated on the CPU: ONNX Runtime runs their Q/DQ nodes and function
bodies. That shows what the graph says, not what an engine does. Products of `tensorrt-native` are
INT8 by INT8, as TensorRT wants them; where ONNX Runtime would saturate them, its sessions are told
not to turn activations into UINT8.
"""

from collections.abc import Sequence
from pathlib import Path

from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_export.runners.model_files import BODY, model_files, model_path
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.products import products_saturate
from treeq_export.targets.names import ORT, TENSORRT, TENSORRT_NATIVE

_FOLD_BELOW_BYTES = 100_000_000


def uses_kernels(target: str) -> bool:
    """Whether our kernels run a target's `treeq` ops."""
    return target == ORT and find_library(ORT_LIBRARY) is not None


def ways_to_run(targets: Sequence[str]) -> list[str]:
    """Return targets with "ort_body" behind "ort", where our library is there to be left out.

    Args:
        targets: Compiled targets.
    """
    both = [ORT, ORT + BODY] if uses_kernels(ORT) else [ORT]
    return [way for target in targets for way in (both if target == ORT else [target])]


def runner_options(path: Path, target: str) -> dict[str, bool]:
    """Return the options of OrtRunner for a compiled target.

    Args:
        path: Its model file.
        target: As `ways_to_run` names it.

    Returns:
        use_kernels, fold_constants and keep_int8. Constants are folded but for a packed model of
        more than 100 MB that runs without our kernels.
    """
    kernels = uses_kernels(target)
    packed = target.removesuffix(BODY) in (ORT, TENSORRT)
    small = sum(file.stat().st_size for file in model_files(path)) < _FOLD_BELOW_BYTES
    return {
        "use_kernels": kernels,
        "fold_constants": kernels or not packed or small,
        "keep_int8": must_keep_int8(target),
    }


def must_keep_int8(target: str) -> bool:
    """Whether ONNX Runtime would compute a target's sums wrong here with UINT8 activations."""
    return target == TENSORRT_NATIVE and products_saturate()


def open_target(run: Path, target: str, *, threads: int | None = None) -> OrtRunner:
    """Return the runner of a compiled target.

    Args:
        run: The run folder.
        target: As `ways_to_run` names it.
        threads: Threads inside an operator; None lets ONNX Runtime choose.
    """
    path = model_path(run, target)
    return OrtRunner(path, threads=threads, **runner_options(path, target))
