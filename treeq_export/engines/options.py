"""What is to be built, checked before anything is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import RecipeError, RunnerError
from treeq_export.runners.engine_manifest import own_gpu
from treeq_export.runners.tensorrt_library import RUNTIMES, RuntimeName
from treeq_export.targets.names import ENGINES

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
        gpus: Architectures, for example "sm_89"; each gets an engine of its own.
        targets: Compiled targets; empty takes all of TensorRT's that the run has.
        cache: Folder of finished builds; None is DIR/engines/cache.
    """

    runtime: RuntimeName
    gpus: tuple[str, ...]
    targets: tuple[str, ...] = ()
    cache: Path | None = None

    def check(self) -> None:
        """Check names against each other.

        Raises:
            RecipeError: An unknown runtime, GPU or target.
            RunnerError: The runtime does not build for a GPU.
        """
        if self.runtime not in RUNTIMES:
            raise RecipeError(
                f"--runtime: received {self.runtime}, expected one of {', '.join(RUNTIMES)}."
            )
        for target in self.targets:
            if target not in ENGINES:
                raise RecipeError(
                    f"--target: received {target}, expected one of {', '.join(ENGINES)}."
                )
        if not self.gpus:
            raise RecipeError("--gpu: received nothing, expected such as sm_89 or sm_80,sm_89.")
        for gpu in self.gpus:
            self._check_gpu(gpu)

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
