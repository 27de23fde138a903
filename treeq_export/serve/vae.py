"""The decoder of latents: a diffusers AutoencoderKL folder, checked before it is copied."""

import json
from dataclasses import dataclass
from pathlib import Path

from treeq_export.errors import ServeError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class Vae:
    """An autoencoder.

    Attributes:
        folder: With config.json and the weights.
        factor: Pixels per latent, along each side.
        channels: Channels of the image.
    """

    folder: Path
    factor: int
    channels: int

    @property
    def files(self) -> tuple[Path, ...]:
        """What has to be copied."""
        return self.folder / CONFIG_FILE, self.folder / WEIGHTS_FILE


def open_vae(folder: Path, sample_shape: tuple[int, ...]) -> Vae:
    """Read an autoencoder's configuration.

    Args:
        folder: An AutoencoderKL folder, or a pipeline's with `vae/` in it.
        sample_shape: Of the denoiser's samples.

    Raises:
        ServeError: It is none, or its latents have another number of channels.
    """
    if (folder / "vae" / CONFIG_FILE).is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{folder / CONFIG_FILE}: cannot be read ({error}). "
            f"Give --vae the folder of a diffusers {_CLASS}."
        ) from error
    name = config.get("_class_name")
    if name != _CLASS:
        raise ServeError(f"{folder}: received {name}, expected {_CLASS}.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ServeError(f"{folder / WEIGHTS_FILE}: missing. Save the autoencoder as safetensors.")
    packed = len(sample_shape) == 2
    wanted = sample_shape[1] // 4 if packed else sample_shape[0]
    received = config.get("latent_channels", 4)
    if received != wanted:
        raise ServeError(
            f"{folder}: latent_channels {received}, expected {wanted} as the denoiser's samples. "
            "Give the autoencoder that belongs to the model."
        )
    blocks = config.get("block_out_channels", [64])
    return Vae(folder, 2 ** (len(blocks) - 1), config.get("out_channels", 3))
