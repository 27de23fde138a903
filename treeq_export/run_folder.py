"""The names of everything that a run folder can hold. No other file spells one of them."""

from pathlib import Path
from typing import Final


class RunFolder:
    """Names relative to a run folder: `run / RunFolder.PLAN` is the plan of the folder `run`."""

    RUN: Final = "run.json"  # the recipe, and what each finished stage left
    LOCK: Final = ".lock"
    PLAN: Final = "plan.json"
    TENSORS: Final = "plan.safetensors"
    SEARCH: Final = "search.json"
    SEARCH_FILES: Final = "search"  # what measurements read, and the journal of what they gave
    CALIBRATION: Final = "calibration.json"
    FINETUNE: Final = "finetune.json"
    FINETUNED: Final = "finetuned.safetensors"
    FINETUNE_STATE: Final = "finetune.state.safetensors"  # of a training that is not finished
    COMPILE: Final = "compile.json"
    GRAPHS: Final = "onnx"
    PARITY: Final = "parity.json"
    BENCH: Final = "bench.json"
    QUALITY: Final = "quality.json"
    SAMPLES: Final = "samples"
    BASELINE: Final = "baseline"  # a run of its own, without search and finetune
    REPORT: Final = "report.json"
    PAGE: Final = "report.html"
    BUILD: Final = "build.json"
    ENGINES: Final = "engines"
    TRITON: Final = "triton"

    @staticmethod
    def graph(target: str) -> str:
        """Return the name of a compiled target's model file."""
        return f"{RunFolder.GRAPHS}/{target}/model.onnx"

    @staticmethod
    def engine(runtime: str, target: str, gpu: str = "") -> str:
        """Return the name of an engine's folder; without a GPU, of the folder of all GPUs."""
        return str(Path(RunFolder.ENGINES, runtime, target, gpu))

    @staticmethod
    def sample_grid(side: str) -> str:
        """Return the name of the picture of a side's samples ("fp", "quantized", "baseline")."""
        return f"{RunFolder.SAMPLES}/{side}.png"
