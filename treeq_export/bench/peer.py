"""The peer: what onnxruntime.quantization makes of the same full-precision graph.

`quantize_static` in QDQ format with min-max calibration, MatMul and Gemm only, INT8 weights per
output channel. Of the tool's settings the ones that run fastest on x86 are taken, so that the
opponent is as strong as its tool can make it (a DiT of width 384, one thread, AVX512-VNNI, where
fp32 takes 86 ms):

- UINT8 activations (the tool's "U8S8"): with its default, INT8, a part of the MatMuls fell back to
  fp32: 63 ms against 46 ms.
- No Q/DQ behind a MatMul or Gemm: 37 ms and 2 dB less error, because biases and residuals are added
  in floating point and nothing is quantized twice.
- `reduce_range` where products saturate (no VNNI), as the tool's documentation asks for, because
  its 16-bit sums would saturate.

Calibration takes the model's own example inputs. Only the speed and the size of this graph are
reported, never its image quality.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from treeq_export.artefacts import atomic_folder, sha256_of_file
from treeq_export.environment import runtime_version
from treeq_export.errors import OutputError, RunnerError
from treeq_export.progress import Say, say_nothing
from treeq_export.runners.model_files import OUR_FILES, model_files
from treeq_export.runners.products import products_saturate
from treeq_export.sealed import read_sealed_json, write_sealed_json

Inputs = Mapping[str, NDArray[Any]]

SOURCE_FILE = "source.json"
_OP_TYPES = ["MatMul", "Gemm"]

_log = logging.getLogger(__name__)


def make_int8_peer(
    fp32: Path, folder: Path, calibration: Sequence[Inputs], say: Say = say_nothing
) -> Path:
    """Quantize a graph by onnxruntime.quantization, or return the cached result.

    Args:
        fp32: The full-precision graph.
        folder: Folder of the result, with `source.json` beside it that says what it was made of;
            it is made again when the graph, the tool or its settings changed, or it is damaged.
        calibration: Inputs of the graph by name; their ranges become the activation ranges.
        say: Told in one line that it is damaged.

    Returns:
        The quantized graph, `folder`/model.onnx.

    Raises:
        RunnerError: The tool cannot quantize this graph.
        OutputError: The folder cannot be written to.
    """
    path = folder / "model.onnx"
    reduce_range = products_saturate()
    source = {
        "fp32_sha256": [sha256_of_file(file) for file in model_files(fp32)],
        "onnxruntime": runtime_version(),
        "reduce_range": reduce_range,
    }
    made = read_sealed_json(folder / SOURCE_FILE, say) or {}
    if made.get("source") == source:
        if made["files"] == _digests(path):
            return path
        say(f"{path}: damaged; it is made again.")
    with atomic_folder(folder, (*OUR_FILES, SOURCE_FILE)) as temporary:
        try:
            _quantize(fp32, temporary / path.name, calibration, reduce_range)
        except (OSError, OutputError):
            raise
        except Exception as error:
            _check_room(temporary, fp32)
            reason = " ".join(str(error).split())
            raise RunnerError(
                f"{fp32}: onnxruntime.quantization cannot quantize it ({reason:.200}). "
                "Compile again, or leave the ort_int8 target out."
            ) from error
        made = {"source": source, "files": _digests(temporary / path.name)}
        write_sealed_json(temporary / SOURCE_FILE, made)
    return path


def _digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a model's files by name."""
    return {file.name: sha256_of_file(file) for file in model_files(path)}


def _check_room(folder: Path, fp32: Path) -> None:
    """Write as much as the tool does: it hides a full disk behind errors of other kinds.

    Raises:
        OSError: There is no room for it.
    """
    room = folder / "room"
    room.write_bytes(bytes(fp32.stat().st_size))
    room.unlink()


def _quantize(fp32: Path, path: Path, calibration: Sequence[Inputs], reduce_range: bool) -> None:
    # The quantization tools pull in onnx and a shape inference; the children need neither.
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Inputs] = iter(calibration)

        def get_next(self) -> dict[str, NDArray[Any]] | None:  # pyright: ignore
            batch = next(self.batches, None)
            return None if batch is None else dict(batch)

    large = len(model_files(fp32)) > 1
    # The tool leaves files beside its input.
    workplace = path.with_name("workplace")
    workplace.mkdir()
    quantize_static(
        _prepare(fp32, workplace, large),
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=_OP_TYPES,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
        extra_options={"OpTypesToExcludeOutputQuantization": _OP_TYPES},
    )
    shutil.rmtree(workplace)


def _prepare(fp32: Path, workplace: Path, large: bool) -> Path:
    """Run the tool's shape inference and graph optimization; return what is to be quantized."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = workplace / "prepared.onnx"
    try:
        quant_pre_process(
            fp32,
            prepared,
            save_as_external_data=large,
            all_tensors_to_one_file=large,
            external_data_location=f"{prepared.name}.data" if large else None,
        )
    except Exception as error:  # the tool raises bare Exception; the graph itself will do
        _log.warning("onnxruntime.quantization could not prepare the graph: %s", error)
        for file in model_files(fp32):
            shutil.copyfile(file, workplace / file.name)
        return workplace / fp32.name
    return prepared
