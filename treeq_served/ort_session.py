"""An ONNX Runtime session as a served model and all of treeq-export open one."""

from pathlib import Path
from typing import Any


def open_session(
    model: Path | bytes,
    library: Path | None,
    *,
    threads: int | None = None,
    fold_constants: bool = True,
    keep_int8: bool = False,
    spin: bool = True,
) -> Any:
    """Return a session on the CPU.

    Args:
        model: Path of the model, or its serialized bytes.
        library: Custom-op library to register; None runs function bodies.
        threads: Threads inside an operator; None lets ONNX Runtime choose.
        fold_constants: Whether what does not depend on inputs is computed at load.
        keep_int8: Whether INT8 activations of Q/DQ stay INT8. By default ONNX Runtime turns them
            into UINT8 on x86, which is faster, and saturates there with 8-bit weights where the
            processor has no VNNI.
        spin: Whether a thread that waits for work keeps its core for a while: a little faster where
            nobody else wants the cores, much slower where somebody does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its default, 4, quantizes the activations of weight-only products silently.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if keep_int8:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    for pool in () if spin else ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=None if fold_constants else ["ConstantFolding"],
    )
