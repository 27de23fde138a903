"""What is to be built, checked before anything is loaded."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import RecipeError, RunnerError
from treeq_export.records.build import PluginKind
from treeq_export.runners.compiled import TENSORRT, TENSORRT_TARGETS
from treeq_export.runners.engine_manifest import own_gpu
from treeq_export.runners.tensorrt_library import RUNTIMES, RuntimeName
from treeq_export.runners.tensorrt_quick_plugin import OLDEST_TENSORRT

# What TensorRT-RTX 1.7 can be told to build for on any machine.
RTX_GPUS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
_NO_RTX = {
    "sm_90": "TensorRT-RTX has no build for Hopper (H100, H200); use --runtime tensorrt there",
    "sm_100": "TensorRT-RTX has no build for this GPU; use --runtime tensorrt there",
}


@dataclass(frozen=True)
class BuildOptions:
    """Options of `treeq-export build`.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        gpus: Such as "sm_89"; each gets an engine of its own.
        targets: Compiled targets; empty takes all of TensorRT's that the run has.
        cache: Folder of finished builds; None is DIR/engines/cache.
        split: Writes the graph for quick plugins beside a compiled one and returns its path; None
            builds with a library's plugins.
    """

    runtime: RuntimeName
    gpus: tuple[str, ...]
    targets: tuple[str, ...] = ()
    cache: Path | None = None
    split: Callable[[Path], Path] | None = None

    @property
    def plugin_kind(self) -> PluginKind:
        """Whether the engine needs a library of plugins, or holds their kernels."""
        return "library" if self.split is None else "quick"

    def check(self) -> None:
        """Check names against each other.

        Raises:
            RecipeError: An unknown runtime, GPU or target.
            RunnerError: The runtime does not build for a GPU, or has no quick plugins.
        """
        if self.runtime not in RUNTIMES:
            raise RecipeError(
                f"--runtime: received {self.runtime}, expected one of {', '.join(RUNTIMES)}."
            )
        for target in self.targets:
            if target not in TENSORRT_TARGETS:
                raise RecipeError(
                    f"--target: received {target}, expected one of {', '.join(TENSORRT_TARGETS)}."
                )
        if self.split is not None:
            self._check_quick()
        if not self.gpus:
            raise RecipeError("--gpu: received nothing, expected such as sm_89 or sm_80,sm_89.")
        for gpu in self.gpus:
            self._check_gpu(gpu)

    def _check_quick(self) -> None:
        if self.runtime != "tensorrt":
            raise RunnerError(
                f"--plugins quick: {self.runtime} has none; TensorRT >= {OLDEST_TENSORRT} has. "
                "Use --runtime tensorrt, or --plugins library."
            )
        if set(self.targets) - {TENSORRT}:
            raise RecipeError(
                f"--plugins quick: received --target {','.join(self.targets)}, expected "
                f"{TENSORRT}, the one target with plugins."
            )

    def _check_gpu(self, gpu: str) -> None:
        if not re.fullmatch(r"sm_\d{2,3}", gpu):
            raise RecipeError(f"--gpu: received {gpu}, expected such as sm_80, sm_89 or sm_120.")
        if self.runtime == "tensorrt-rtx" and gpu not in RTX_GPUS:
            reason = _NO_RTX.get(gpu, "TensorRT-RTX has no build for it")
            raise RunnerError(f"--gpu {gpu}: {reason}. It builds for {', '.join(RTX_GPUS)}.")
        if self.runtime == "tensorrt":
            own = own_gpu()
            if own != gpu:
                raise RunnerError(
                    f"--gpu {gpu}: TensorRT builds for the machine's own GPU only, which is "
                    f"{own or 'none'}. Build on a machine with {gpu}, or use "
                    "--runtime tensorrt-rtx."
                )
