"""Which files are a compiled model, and where they lie in a run folder."""

from pathlib import Path

from treeq_export.run_folder import RunFolder

MODEL_FILE = "model.onnx"
DATA_FILE = f"{MODEL_FILE}.data"
# What we write into the folder of a model; whatever else lies there is somebody else's.
OUR_FILES = (MODEL_FILE, DATA_FILE)


def model_path(run: Path, target: str) -> Path:
    """Return DIR/onnx/<target>/model.onnx, of a target or the peer."""
    return run / RunFolder.graph(target)


def model_files(path: Path) -> list[Path]:
    """Return a model file and its external data, as far as they are there."""
    files = (path, path.with_name(f"{path.name}.data"))
    return [file for file in files if file.is_file()]
