"""Opening a checkpoint and loading its weights into the diffusers network.

Accepted: a folder with `config.json` and weights (`weight_files`), a pipeline folder with such a
`transformer/` inside, or a `.pt` file of facebookresearch/DiT (`dit_original`). `open_checkpoint`
reads the configuration, the names of the tensors, and the digest; `load_model` reads the weights.
Nothing touches the network.

The model is built on the meta device and takes the tensors as they were read, so the weights are in
memory once, or one and a half times while half precision is widened to float32.
"""

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeq_export.artefacts import digest_of, sha256_of_file
from treeq_export.errors import CheckpointError
from treeq_export.model import dit_original
from treeq_export.model.families import CLASS_NAMES, find_family
from treeq_export.model.families.dit import DiTDenoiser
from treeq_export.model.torch_file import read_torch_file
from treeq_export.model.weight_files import (
    AGAIN,
    CONFIG_FILE,
    LORA,
    explain_file,
    explain_names,
    find_weights,
    is_lora,
    model_folder,
    model_name,
    open_weights,
)
from treeq_export.model.zoo import Denoiser
from treeq_export.reading import read_object

_NO_BLOCKS = {"num_layers": 0, "num_single_layers": 0}
_SAME_MODEL = f"Weights and {CONFIG_FILE} must come from the same model."
_TYPO = 0.75  # least similarity of a class name without what all of them end with


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: The folder, or the `.pt` file.
        name: Folder name or file stem.
        family: The wrapper of its network.
        config: The diffusers configuration without the underscore keys.
        files: Weight files in name order.
        sha256: Digest of class, configuration and weight files; the same wherever they lie.
        notes: Sentences that a person should know.
    """

    path: Path
    name: str
    family: type[Denoiser]
    config: dict[str, Any]
    files: tuple[Path, ...]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """Name of the network's class in diffusers."""
        return self.family.diffusers_class


def open_checkpoint(path: Path, variant: str | None = None) -> Checkpoint:
    """Read what a checkpoint is, without its weights.

    Args:
        path: A folder in diffusers layout (model, pipeline, or repository in the Hugging Face
            cache), or an original DiT `.pt` file.
        variant: Variant of the weight files, such as "fp16"; None takes those without one, or the
            only variant there is.

    Returns:
        The checkpoint with its digest.

    Raises:
        CheckpointError: A file is missing, truncated or not what it should be, the class is of
            no family, or the model is quantized already.
    """
    path = path.expanduser()
    notes: list[str] = []
    if path.is_dir():
        folder = model_folder(path)
        if folder is None:
            raise CheckpointError(f"{path}: {_why_no_model(path)}")
        family, config = _read_config(folder / CONFIG_FILE)
        files, found = find_weights(folder, variant)
        if found is not None:
            notes.append(f"{folder}: weights of variant {found}, the only ones there are.")
        names = [name for file in files for name in _names_in(file)]
        unused = sorted(family.unused_tensors & set(names))
        if unused:
            notes.append(f"{folder}: {', '.join(unused)} is not used, as in diffusers.")
    elif path.is_file():
        if path.suffix not in (".pt", ".pth"):
            raise CheckpointError(
                f"{path}: received a {path.suffix or 'plain'} file, expected a folder with "
                f"{CONFIG_FILE} or an original DiT .pt file; {explain_file(path)}"
            )
        family, files = DiTDenoiser, (path,)
        config = dit_original.make_config(path, read_torch_file(path))
    else:
        raise CheckpointError(_explain_missing(path))
    digest = _digest(family.diffusers_class, config, files)
    return Checkpoint(path, model_name(path), family, config, files, digest, tuple(notes))


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the network and give it the checkpoint's weights.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The diffusers model: float32, evaluation mode, parameters without gradient.

    Raises:
        CheckpointError: A tensor is missing, unexpected, wrongly shaped, NaN or infinite, or the
            configuration does not describe a network.
    """
    where = checkpoint.path
    tensors = _read_tensors(checkpoint)
    for name in checkpoint.family.unused_tensors:
        tensors.pop(name, None)
    if not where.is_file():
        return fill_model(checkpoint, tensors)
    model = build_model(checkpoint)
    dit_original.check_positions(where, tensors["pos_embed"], model)
    tensors = dit_original.convert_tensors(tensors, checkpoint.config["num_layers"])
    model = fill_model(checkpoint, tensors)
    dit_original.use_original_timesteps(model)
    return model


def fill_model(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> nn.Module:
    """Build the network and give it tensors by name, as `load_model` does.

    Raises:
        CheckpointError: The same as by `load_model`.
    """
    where, model = checkpoint.path, build_model(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_names(where, expected, tensors)
    _check_shapes(where, expected, tensors)
    for name in tensors:
        tensors[name] = _as_finite_float32(where, name, tensors[name])
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def open_module(model: nn.Module) -> tuple[Checkpoint, nn.Module]:
    """Return what a diffusers network in memory is, and a float32 copy for inference.

    Args:
        model: A network of one of the families; it is left as it is. What is float32 on the CPU
            already is shared with it, not copied.

    Raises:
        CheckpointError: The class is of no family, or a weight is NaN or infinite.
    """
    class_name, config = type(model).__name__, dict(getattr(model, "config", {}))
    family = find_family(class_name, str(config.get("norm_type")))
    if family is None:
        raise CheckpointError(
            f"{class_name}: no supported network. Supported: {', '.join(CLASS_NAMES)}."
        )
    public = {key: config[key] for key in sorted(config) if not key.startswith("_")}
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    digest = digest_of(config=public, class_name=class_name, tensors=digest_tensors(tensors))
    checkpoint = Checkpoint(Path(class_name), class_name, family, public, (), digest)
    return checkpoint, fill_model(checkpoint, tensors)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _why_no_model(path: Path) -> str:
    """Say why a folder is no checkpoint, and what is."""
    if (path / "snapshots").is_dir():
        return (
            "a repository of the Hugging Face cache whose main revision is not complete. "
            "Download it again with `hf download`, or give one folder of snapshots/."
        )
    if (path / "adapter_config.json").is_file():
        return LORA
    files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".gguf")]
    there = f" There is {files[0].name}: {explain_file(files[0])}" if files else ""
    return (
        f"no {CONFIG_FILE}, neither in it nor in transformer/. "
        f"Give the folder that diffusers' save_pretrained wrote.{there}"
    )


def _explain_missing(path: Path) -> str:
    """Say that nothing is there; a hub id or URL looks like a path in a recipe."""
    usual = "Set model.checkpoint to a diffusers folder or a .pt."
    url = re.search(r"https?:/+(?:www\.)?huggingface\.co/([^/]+/[^/]+)", str(path))
    hub = url[1] if url else "/".join(path.parts[-2:])
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub) is not None
    if url or (is_id and not path.parent.exists()):
        kind = "a URL" if url else "perhaps a hub id"
        return (
            f"{hub}: no such file or folder, {kind}. Download it first: `hf download {hub} "
            f"--local-dir {hub.split('/')[-1]}`, and give that folder."
        )
    return f"{path}: no such file or folder. {usual}"


def _read_config(path: Path) -> tuple[type[Denoiser], dict[str, Any]]:
    """Return the family and the configuration without the underscore keys."""
    raw = read_object(path, error=CheckpointError, remedy=AGAIN)
    class_name = str(raw.get("_class_name"))
    family = find_family(class_name, str(raw.get("norm_type")))
    if family is None:
        near = _nearest_family(class_name)
        hint = "is not supported." if near is None else f"is unknown. Did you mean {near}?"
        raise CheckpointError(
            f"{path}: _class_name {class_name} {hint} Supported: {', '.join(CLASS_NAMES)}."
        )
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{path}: the model is already quantized by {method or 'an unnamed method'} "
            "(quantization_config). Use the checkpoint before quantization."
        )
    return family, {key: raw[key] for key in sorted(raw) if not key.startswith("_")}


def _nearest_family(class_name: str) -> str | None:
    """Return the class of a misspelt name; other models' names share most letters too."""

    def own_part(name: str) -> str:
        return re.sub(r"_?trans.*", "", name.lower())

    def digits(name: str) -> str:
        return "".join(re.findall(r"\d", own_part(name)))

    scores = {
        family: difflib.SequenceMatcher(None, own_part(class_name), own_part(family)).ratio()
        for family in CLASS_NAMES
        if digits(family) == digits(class_name) and family[:1].lower() == class_name[:1].lower()
    }
    best = max(scores, key=lambda family: scores[family], default=None)
    return best if best is not None and scores[best] >= _TYPO else None


def _names_in(file: Path) -> Iterable[str]:
    """Return the names of the tensors of a weight file; a truncated file is found here."""
    if file.suffix == ".safetensors":
        with open_weights(file) as reader:
            return list(reader.header)
    return read_torch_file(file)


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
            with open_weights(file) as reader:
                tensors |= {name: reader.get(name) for name in reader.header}
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
    except MemoryError:
        raise
    except Exception as error:  # diffusers raises what its code meets
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
        explained = explain_names(tensors, where)
        if explained is not None:
            raise CheckpointError(f"{where}: the weights have other names; {explained}")
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f" (there is {near[0]})" if near else ""
        raise CheckpointError(
            f"{where}: {missing[0]}{hint}: missing, one of {len(missing)} missing tensors of "
            f"{len(expected)}. {_SAME_MODEL}"
        )
    if unexpected:
        remedy = _SAME_MODEL
        if is_lora(unexpected[0]):
            remedy = "It is part of a LoRA adapter: fuse that with fuse_lora() and save again."
        raise CheckpointError(
            f"{where}: {unexpected[0]}: unexpected, one of {len(unexpected)} tensors that the "
            f"network lacks. {remedy}"
        )


def _check_shapes(
    where: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{where}: {name}: received shape {tuple(tensors[name].shape)}, expected {shape}. "
                f"{_SAME_MODEL}"
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
