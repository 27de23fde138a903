"""PNG files of generated images, with how they were made."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.errors import ServeError

SHOWN_PIXELS = 256  # a smaller image is enlarged to at least this, unless a scale is given
_MAX_SIDE = 16384  # of an enlarged image
_CHANNELS = (1, 3)


def default_scale(height: int, width: int) -> int:
    """Return the whole factor that makes an image at least SHOWN_PIXELS high and wide.

    A strip's is smaller, so that its long side stays below 16384.

    Example:
        >>> default_scale(8, 8), default_scale(100, 60), default_scale(512, 512)
        (32, 5, 1)
    """
    wanted = -(-SHOWN_PIXELS // min(height, width))
    return max(1, min(wanted, _MAX_SIDE // max(height, width)))


def to_png(
    image: NDArray[np.uint8], text: Mapping[str, Any] | None = None, scale: int | None = None
) -> bytes:
    """Return a PNG file.

    Args:
        image: (H, W, C) uint8 with C = 1 or 3, as the sampler's output `image` without its batch.
        text: Texts that are written into the file, key to value; None values are left out.
        scale: Whole factor; every pixel becomes a square. None is `default_scale`.

    Returns:
        The bytes.

    Raises:
        ServeError: Another shape or dtype, or a scale below 1.

    Example:
        >>> to_png(np.zeros((8, 8, 1), np.uint8))[1:4]
        b'PNG'
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    is_picture = image.ndim == 3 and image.shape[2] in _CHANNELS and image.size > 0
    if image.dtype != np.uint8 or not is_picture:
        raise ServeError(
            f"image: received {image.dtype} {image.shape}, expected uint8 (height, width, 1 or 3).",
            kind="failed",
        )
    factor = default_scale(*image.shape[:2]) if scale is None else scale
    if factor < 1:
        raise ServeError(f"scale: received {scale}, expected 1 or more.", kind="refused")
    if factor * max(image.shape[:2]) > _MAX_SIDE and factor > 1:
        raise ServeError(
            f"scale: received {scale}, which makes a side longer than {_MAX_SIDE} pixels. "
            "Choose a smaller one.",
            kind="refused",
        )
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    info = PngInfo()
    for key, value in (text or {}).items():
        if value is not None:
            info.add_text(key, str(value))
    file = io.BytesIO()
    Image.fromarray(large[..., 0] if image.shape[2] == 1 else large).save(
        file, format="PNG", pnginfo=info
    )
    return file.getvalue()
