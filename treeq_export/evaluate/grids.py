"""Grids of samples as PNG files: ten columns, so that with ten classes each column is one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from treeq_export.artefacts import atomic_path
from treeq_served.denoise import is_pixels, unpack_samples

NUM_COLUMNS = 10
MAX_ROWS = 10
_MIN_PIXELS = 48  # smaller images are enlarged to at least this by whole factors
_GAP = 2
_BACKGROUND = 255


@dataclass(frozen=True)
class PixelMapping:
    """How samples become pixels; full precision and quantized share one.

    Attributes:
        low: (c, 1, 1) value shown black.
        high: (c, 1, 1) value shown white.
        description: Words for what is shown; written into the PNG file.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    description: str


def choose_mapping(full_precision: NDArray[np.float32]) -> PixelMapping:
    """Return the mapping for images in [-1, 1]; for latents that of their first three channels.

    Args:
        full_precision: (n, *sample_shape); latents are stretched to its extent, per channel.
    """
    if is_pixels(full_precision.shape[1:]):
        one = np.ones((full_precision.shape[1], 1, 1), dtype=np.float32)
        return PixelMapping(-one, one, "images in [-1, 1]")
    planes = _visible(unpack_samples(full_precision))
    return PixelMapping(
        planes.min(axis=(0, 2, 3))[:, None, None],
        planes.max(axis=(0, 2, 3))[:, None, None],
        f"latent channels 0..{planes.shape[1] - 1}, "
        "each stretched to the extent of full precision; not decoded",
    )


def _visible(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return one channel or three of (n, c, h, w)."""
    return planes[:, : 3 if planes.shape[1] >= 3 else 1]


def draw_grid(samples: NDArray[np.float32], mapping: PixelMapping) -> NDArray[np.uint8]:
    """Return a grid of the first samples, row by row.

    Args:
        samples: (n, *sample_shape) float32, finite.
        mapping: From `choose_mapping`.

    Returns:
        (height, width, 3) uint8.
    """
    shown = samples[: NUM_COLUMNS * MAX_ROWS]
    planes = _visible(unpack_samples(shown))
    extent = np.maximum(mapping.high - mapping.low, np.finfo(np.float32).tiny)
    unit = np.clip((planes - mapping.low) / extent, 0.0, 1.0)
    pixels = np.rint(255 * unit).astype(np.uint8).transpose(0, 2, 3, 1)
    factor = -(-_MIN_PIXELS // min(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    num, height, width, _ = pixels.shape
    columns, rows = min(num, NUM_COLUMNS), -(-num // NUM_COLUMNS)
    shape = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
    grid = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top = index // NUM_COLUMNS * (height + _GAP)
        left = index % NUM_COLUMNS * (width + _GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def write_grid(path: Path, samples: NDArray[np.float32], mapping: PixelMapping) -> None:
    """Write a grid as PNG, atomically, with the mapping's description as its text.

    Raises:
        OutputError: The folder cannot be written to.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", mapping.description)
    with atomic_path(path) as temporary:
        Image.fromarray(draw_grid(samples, mapping)).save(temporary, format="PNG", pnginfo=text)
