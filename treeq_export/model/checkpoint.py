"""Opening a checkpoint and loading its weights into the diffusers network.

Accepted: a folder with `config.json` and `diffusion_pytorch_model.safetensors` (or its sharded
index, or the older `.bin`), a pipeline folder with such a `transformer/` inside, or a `.pt` file of
facebookresearch/DiT (`dit_original`). `open_checkpoint` reads the configuration, the names and
shapes of the tensors, and the digest; `load_model` reads the weights. Nothing touches the network.

The model is built on the meta device and takes the tensors as they were read, so the weights are in
memory once, or one and a half times while half precision is widened to float32.
"""

import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import CheckpointError
from treeq_export.model import dit_original
from treeq_export.model.torch_file import read_torch_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
TORCH_FILE = "diffusion_pytorch_model.bin"

FAMILIES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
# Published DiT and PixArt checkpoints still name the class that diffusers split in two.
_LEGACY_CLASS = "Transformer2DModel"
_LEGACY_FAMILIES = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}
_NO_BLOCKS = {"num_layers": 0, "num_single_layers": 0}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: The folder, or the `.pt` file.
        name: Folder name or file stem.
        class_name: One of `FAMILIES`.
        config: The diffusers configuration without the underscore keys.
        files: Weight files in name order.
        sha256: Digest of class, configuration and weight files; the same wherever they lie.
    """

    path: Path
    name: str
    class_name: str
    config: dict[str, Any]
    files: tuple[Path, ...]
    sha256: str


def open_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint is, without its weights.

    Args:
        path: A folder in diffusers layout (model or pipeline), or an original DiT `.pt` file.

    Returns:
        The checkpoint with its digest.

    Raises:
        CheckpointError: A file is missing, truncated or not what it should be, or the class is none
            of `FAMILIES`.
    """
    if path.is_dir():
        folder = _model_folder(path)
        class_name, config = _read_config(folder / CONFIG_FILE)
        files = _weight_files(folder)
        for file in files:
            _check_header(file)
    elif path.is_file():
        if path.suffix not in (".pt", ".pth"):
            raise CheckpointError(
                f"{path}: received a {path.suffix or 'plain'} file, expected a folder with "
                f"{CONFIG_FILE} or an original DiT .pt file. Give the folder that it lies in."
            )
        class_name, files = "DiTTransformer2DModel", (path,)
        config = dit_original.make_config(path, read_torch_file(path))
    else:
        raise CheckpointError(
            f"{path}: no such file or folder. Set model.checkpoint to a diffusers folder or a .pt."
        )
    absolute = path.absolute()
    name = absolute.name if path.is_dir() else absolute.stem
    return Checkpoint(path, name, class_name, config, files, _digest(class_name, config, files))


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the network and give it the checkpoint's weights.

    Args:
        checkpoint: What `open_checkpoint` returned.

    Returns:
        The diffusers model: float32, evaluation mode, parameters without gradient.

    Raises:
        CheckpointError: A tensor is missing, unexpected, wrongly shaped, NaN or infinite, or the
            configuration does not describe a network.
    """
    where = checkpoint.path
    tensors = _read_tensors(checkpoint)
    model = build_model(checkpoint)
    if where.is_file():
        dit_original.check_positions(where, tensors["pos_embed"], model)
        tensors = dit_original.convert_tensors(tensors, checkpoint.config["num_layers"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_names(where, expected, tensors)
    _check_shapes(where, expected, tensors)
    for name in tensors:
        tensors[name] = _as_finite_float32(where, name, tensors[name])
    model.load_state_dict(tensors, assign=True)
    if where.is_file():
        dit_original.use_original_timesteps(model)
    return model.requires_grad_(False).eval()


def _model_folder(path: Path) -> Path:
    """Return the folder that holds the configuration: `path` or its `transformer/`."""
    for folder in (path, path / "transformer"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise CheckpointError(
        f"{path}: no {CONFIG_FILE}, neither in it nor in transformer/. "
        "Give the folder that diffusers' save_pretrained wrote."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Download the file again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: received a {type(raw).__name__}, expected an object. Download it again."
        )
    return raw


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the class name and the configuration without the underscore keys."""
    raw = _read_json(path)
    class_name = str(raw.get("_class_name"))
    if class_name == _LEGACY_CLASS:
        class_name = _LEGACY_FAMILIES.get(str(raw.get("norm_type")), class_name)
    if class_name not in FAMILIES:
        near = difflib.get_close_matches(class_name, FAMILIES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise CheckpointError(
            f"{path}: _class_name {class_name}: unknown.{hint} Known: {', '.join(FAMILIES)}."
        )
    return class_name, {key: raw[key] for key in sorted(raw) if not key.startswith("_")}


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files in name order; every shard that an index names must exist."""
    for name in (WEIGHTS_FILE, TORCH_FILE):
        if (folder / name).is_file():
            return (folder / name,)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: no weights. Expected {WEIGHTS_FILE} (or {INDEX_FILE} and its shards) "
            f"beside {CONFIG_FILE}; download it too."
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: no weight_map. Download the file again.")
    files = tuple(folder / name for name in sorted({str(shard) for shard in shards.values()}))
    for file in files:
        if not file.is_file() or file.parent != folder:
            raise CheckpointError(
                f"{file}: missing, but named by {INDEX_FILE}. Download this shard into {folder}."
            )
    return files


def _check_header(file: Path) -> None:
    """Read the header of a weight file; a truncated file is found here."""
    if file.suffix == ".safetensors":
        _open_safetensors(file)
    else:
        read_torch_file(file)


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {file.stat().st_size} bytes that are no complete safetensors file "
            f"({error}). Download it again."
        ) from error


def _digest(class_name: str, config: dict[str, Any], files: tuple[Path, ...]) -> str:
    text = json.dumps({"class_name": class_name, "config": config}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for file in files:
        digest.update(sha256_of_file(file).encode())
    return digest.hexdigest()


def _read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all tensors of all weight files, mapped from the files rather than copied."""
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.files:
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as reader:
                tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        else:
            tensors |= read_torch_file(file)
    return tensors


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the network with parameters on the meta device and its computed buffers real.

    That is enough to know shapes and conventions without reading the weights.

    Buffers that are computed and not stored (position tables) belong to no block, so they are taken
    from a second network without blocks.
    """
    import diffusers  # heavy: 5 s, and only needed once weights are wanted

    kind = getattr(diffusers, checkpoint.class_name)
    known = inspect.signature(kind).parameters
    config = {key: value for key, value in checkpoint.config.items() if key in known}
    small = config | {key: value for key, value in _NO_BLOCKS.items() if key in known}
    try:
        with torch.device("meta"):
            model = kind(**config)
        computed = dict(kind(**small).named_buffers())
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path}: {CONFIG_FILE} describes no {checkpoint.class_name} ({reason}). "
            "Restore the published one."
        ) from error
    stored = model.state_dict()
    for name, _ in list(model.named_buffers()):
        if name not in stored:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, computed[name])
    return model


def _check_names(
    where: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = sorted(name for name in tensors if name not in expected)
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f" (there is {near[0]})" if near else ""
        raise CheckpointError(
            f"{where}: {missing[0]}{hint}: missing, one of {len(missing)} missing tensors of "
            f"{len(expected)}. Weights and {CONFIG_FILE} must come from the same model."
        )
    if unexpected:
        raise CheckpointError(
            f"{where}: {unexpected[0]}: unexpected, one of {len(unexpected)} tensors that the "
            f"network lacks. Weights and {CONFIG_FILE} must come from the same model."
        )


def _check_shapes(
    where: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{where}: {name}: received shape {tuple(tensors[name].shape)}, expected {shape}. "
                f"Weights and {CONFIG_FILE} must come from the same model."
            )


def _as_finite_float32(where: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{where}: {name}: received {str(tensor.dtype).removeprefix('torch.')}, expected "
            "floating point. Use the checkpoint before quantization."
        )
    tensor = tensor.to(torch.float32)
    num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if num_bad:
        raise CheckpointError(
            f"{where}: {name}: {num_bad} of {tensor.numel()} weights are NaN or infinite. "
            "Download the checkpoint again, or save it from a training that did not diverge."
        )
    return tensor
