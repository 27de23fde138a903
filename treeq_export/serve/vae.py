"""The decoder of latents: a diffusers AutoencoderKL folder, checked before it is copied."""

from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import CheckpointError, ServeError
from treeq_export.model.weight_files import find_weights
from treeq_export.reading import read_object
from treeq_served.denoise import unpacked_shape

CONFIG_FILE = "config.json"
_CLASS = "AutoencoderKL"
_MAX_BLOCKS = 16


@dataclass(frozen=True)
class Vae:
    """An autoencoder.

    Attributes:
        folder: The folder of config.json and the weights.
        files: The files to copy, by the name that diffusers loads them under.
        factor: Pixels per latent, along each side.
        channels: Channels of the image.
    """

    folder: Path
    files: dict[str, Path]
    factor: int
    channels: int


def open_vae(folder: Path, sample_shape: tuple[int, ...]) -> Vae:
    """Read an autoencoder's configuration.

    Args:
        folder: An AutoencoderKL folder, or a pipeline's with `vae/` in it.
        sample_shape: Shape of one sample of the denoiser.

    Raises:
        ServeError: It is none, or its latents have another number of channels.
    """
    if (folder / "vae" / CONFIG_FILE).is_file():
        folder = folder / "vae"
    config = read_object(
        folder / CONFIG_FILE,
        error=ServeError,
        remedy=f"Give --vae the folder of a diffusers {_CLASS}.",
    )
    name = config.get("_class_name")
    if name != _CLASS:
        raise ServeError(f"{folder}: received {name}, expected {_CLASS}.")
    files = {CONFIG_FILE: folder / CONFIG_FILE, **_find_weights(folder)}
    wanted = unpacked_shape(sample_shape)[0]
    received = config.get("latent_channels", 4)
    if received != wanted:
        raise ServeError(
            f"{folder}: latent_channels {received}, expected {wanted} as the denoiser's samples. "
            "Give the autoencoder that belongs to the model."
        )
    blocks, channels = config.get("block_out_channels", [64]), config.get("out_channels", 3)
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MAX_BLOCKS:
        raise ServeError(f"{folder}: block_out_channels {blocks!r:.60}, expected a short list.")
    if not isinstance(channels, int) or channels < 1:
        raise ServeError(f"{folder}: out_channels {channels!r:.60}, expected a positive number.")
    return Vae(folder, files, 2 ** (len(blocks) - 1), channels)


def _find_weights(folder: Path) -> dict[str, Path]:
    """Return the weights of any variant by the name without it; there has to be one file."""
    try:
        files, _ = find_weights(folder, None)
    except CheckpointError as error:
        raise ServeError(str(error)) from error
    if len(files) != 1:
        raise ServeError(
            f"{folder}: {len(files)} shards of weights, expected one file. Save the autoencoder "
            "again with a max_shard_size above its size."
        )
    return {f"diffusion_pytorch_model{files[0].suffix}": files[0]}
