"""Which files are a compiled model."""

from pathlib import Path

MODEL_FILE = "model.onnx"
DATA_FILE = f"{MODEL_FILE}.data"
# What we write into the folder of a model; whatever else lies there is somebody else's.
OUR_FILES = (MODEL_FILE, DATA_FILE)


def model_files(path: Path) -> list[Path]:
    """Return a model file and its external data, as far as they are there."""
    files = (path, path.with_name(f"{path.name}.data"))
    return [file for file in files if file.is_file()]
