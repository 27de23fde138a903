"""ONNX Runtime on the CPU, with our kernels for the ops of the `ort` target.

The custom-op library that is installed beside the package is registered with every session. A
session without it (`use_kernels=False`, or another host) runs the function bodies instead.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from treeq_export import __version__
from treeq_export.environment import default_threads
from treeq_export.errors import RunnerError
from treeq_export.runners.cpu_kernels import ORT_LIBRARY, find_library
from treeq_served.ort_session import open_session

if TYPE_CHECKING:
    from torch import Tensor

_REINSTALL = "Reinstall treeq-export."


@cache
def check_version(library: Path) -> None:
    """Check that the custom-op library was built from this package.

    Raises:
        RunnerError: It is of another version, or cannot be loaded.
    """
    try:
        read_version = ctypes.CDLL(str(library)).treeq_version
    except (OSError, AttributeError) as error:
        raise RunnerError(
            f"{library}: is not treeq-export's custom-op library: {error}. {_REINSTALL}"
        ) from error
    read_version.restype = ctypes.c_char_p
    version = (read_version() or b"").decode()
    if version != __version__:
        raise RunnerError(
            f"{library}: version {version}, expected {__version__} as the package. {_REINSTALL}"
        )


class OrtRunner:
    """Runs an ONNX model; its session exists only while the runner is entered.

    Args:
        model: Path of the model, or its serialized bytes.
        threads: Threads inside an operator; None is one per processor that this process may use,
            or OMP_NUM_THREADS.
        use_kernels: Whether `treeq` ops run in our library where it is installed.
        fold_constants: Whether ONNX Runtime computes at load what does not depend on inputs. The
            function bodies of a large packed model are better unpacked at each call: DiT-XL/2 at
            3 bits then loads in 1.1 s and 0.1 GB, not in 15 s and 9.6 GB; it runs 4 times slower.
        keep_int8: Whether INT8 activations of Q/DQ stay INT8, see `open_session`.
        spin: Whether threads that wait for work keep their cores (see `open_session`). What times a
            model alone on a machine wants that.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        use_kernels: bool = True,
        fold_constants: bool = True,
        keep_int8: bool = False,
        spin: bool = False,
    ) -> None:
        self.model = model
        self.threads = default_threads() if threads is None else threads
        self.spin = spin
        self.use_kernels = use_kernels
        self.fold_constants = fold_constants
        self.keep_int8 = keep_int8
        self._session: Any = None

    def __enter__(self) -> Self:
        if isinstance(self.model, Path) and not self.model.is_file():
            raise RunnerError(f"{self.model}: missing. Run the compile stage first.")
        library = find_library(ORT_LIBRARY) if self.use_kernels else None
        try:
            if library is not None:
                check_version(library)
            self._session = open_session(
                self.model,
                library,
                threads=self.threads,
                fold_constants=self.fold_constants,
                keep_int8=self.keep_int8,
                spin=self.spin,
            )
        except RunnerError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            name = self.model if isinstance(self.model, Path) else "model in memory"
            raise RunnerError(f"{name}: ONNX Runtime cannot load it: {reason}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order; the runner has to be entered."""
        return tuple(value.name for value in self._session.get_inputs())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order; the runner has to be entered."""
        return tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, "NDArray[Any] | Tensor"]) -> NDArray[np.float32]:
        """Return the first output of named inputs, each with a leading batch axis."""
        return self.run_all(inputs)[self.output_names[0]]

    def run_all(self, inputs: Mapping[str, "NDArray[Any] | Tensor"]) -> dict[str, NDArray[Any]]:
        """Return every output by name.

        Raises:
            RunnerError: The runner is not entered, or an input has a wrong name, type or shape.
        """
        if self._session is None:
            raise RunnerError("OrtRunner: not entered. Use it in a with statement.")
        feeds = {
            value.name: _narrowed(np.asarray(inputs[value.name]), value.type)
            for value in self._session.get_inputs()
            if value.name in inputs
        }
        try:
            results = self._session.run(None, feeds)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise RunnerError(f"ONNX Runtime cannot run the model: {reason}") from error
        return dict(zip(self.output_names, results, strict=True))


def _narrowed(array: NDArray[Any], wanted: str) -> NDArray[Any]:
    """Return int64 labels as int32 where a model takes those."""
    is_wide = wanted == "tensor(int32)" and array.dtype == np.int64
    return array.astype(np.int32) if is_wide else array
