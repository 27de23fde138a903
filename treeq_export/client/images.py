"""Images from a server into files: what `treeq-export client` does."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.artefacts import atomic_path, write_bytes
from treeq_export.client.connection import Arrays, Connection, refused
from treeq_export.client.inputs import make_inputs
from treeq_export.client.picture import to_png
from treeq_export.client.responses import Response, responses
from treeq_export.client.sampler import SamplerInfo
from treeq_export.records.images import ImageRecord, ImagesRecord

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageOrder:
    """What is wanted.

    Attributes:
        label: Class; None of text models.
        conditioning: One row of every text input; None of class-conditional models.
        seed: Seed of the first image; the others have the next ones.
        num: Number of images.
        steps: Solver steps; None leaves it to the server.
        guidance: Guidance scale; None leaves it to the server.
        preview_every: Steps between previews; None is no previews.
        out: PNG file; None writes none.
        scale: Whole factor of enlargement; None is to at least 256 pixels.
        latents: .npy file; None writes none.
        digest: Whether the raw samples are wanted for their digest.
    """

    label: int | None = None
    conditioning: Arrays | None = None
    seed: int = 0
    num: int = 1
    steps: int | None = None
    guidance: float | None = None
    preview_every: int | None = None
    out: Path | None = None
    scale: int | None = None
    latents: Path | None = None
    digest: bool = False

    @property
    def outputs(self) -> list[str]:
        """The outputs that this needs."""
        wanted = {"image": self.out is not None, "latents": self.latents is not None or self.digest}
        return [name for name, needed in wanted.items() if needed]

    def file(self, seed: int, step: int | None = None) -> Path:
        """Return the PNG of a seed, or of its preview at a step."""
        assert self.out is not None
        name = self.out.stem
        name += f".seed{seed}" if self.num > 1 else ""
        name += "" if step is None else f".step{step:03d}"
        return self.out.with_name(f"{name}{self.out.suffix or '.png'}")


def fetch_images(
    connection: Connection,
    info: SamplerInfo,
    order: ImageOrder,
    progress: Progress = lambda _step, _steps: None,
) -> ImagesRecord:
    """Ask for images, as many per request as the server takes, and write them.

    Args:
        connection: Connection to the server.
        info: The server's sampler.
        order: The images that are wanted.
        progress: Called with (step, steps) for every response of a stream.

    Returns:
        The images that were received and written.

    Raises:
        ServeError: The order does not fit the model, or the server refuses or fails.
        OutputError: A file cannot be written.
    """
    if order.num < 1:
        raise refused(f"num: received {order.num}, expected 1 or more.")
    images: list[ImageRecord] = []
    raw: list[NDArray[np.float32]] = []
    for seeds in _seeds_of_requests(order, info.max_batch):
        files: dict[int, list[str]] = {seed: [] for seed in seeds}
        last: Response | None = None
        for last in responses(connection, info, _inputs(info, order, seeds), order.outputs):
            if info.decoupled:
                progress(int(last.arrays["step"].max()), order.steps or info.steps)
            if order.out is not None:
                _write(connection, info, order, last, files)
        assert last is not None  # the result, with which `responses` ends
        images += _records(order, last, files)
        if order.latents is not None:
            raw.append(last.arrays["latents"])
    if order.latents is not None:
        with atomic_path(order.latents) as path, path.open("wb") as file:
            np.save(file, np.concatenate(raw), allow_pickle=False)
    return ImagesRecord(
        url=connection.url,
        model=info.model,
        version=info.version,
        mode=info.mode,
        target=info.target,
        latents=None if order.latents is None else str(order.latents),
        images=images,
    )


def _seeds_of_requests(order: ImageOrder, max_batch: int) -> Iterator[list[int]]:
    """Yield the seeds of each request."""
    end = order.seed + order.num
    for first in range(order.seed, end, max_batch):
        yield list(range(first, min(first + max_batch, end)))


def _inputs(info: SamplerInfo, order: ImageOrder, seeds: list[int]) -> dict[str, NDArray[Any]]:
    return make_inputs(
        info,
        label=order.label,
        seed=seeds,
        steps=order.steps,
        guidance=order.guidance,
        conditioning=order.conditioning,
        preview_every=order.preview_every,
    )


def _write(
    connection: Connection,
    info: SamplerInfo,
    order: ImageOrder,
    response: Response,
    files: dict[int, list[str]],
) -> None:
    """Write the images of a response, and name their files by seed."""
    for row, seed in enumerate(files):
        step = int(response.arrays["step"][row, 0])
        path = order.file(seed, None if response.is_last else step)
        text = {
            "label": order.label,
            "seed": seed,
            "steps": order.steps or info.steps,
            "step": step,
            "guidance": info.guidance if order.guidance is None else order.guidance,
            "model": info.model,
            "version": info.version or None,
            "target": info.target,
            "url": connection.url,
        }
        write_bytes(path, to_png(response.arrays["image"][row], text, order.scale))
        files[seed].append(str(path))


def _records(
    order: ImageOrder, last: Response, files: dict[int, list[str]]
) -> Iterator[ImageRecord]:
    """Yield a record for each image of a request."""
    for row, (seed, paths) in enumerate(files.items()):
        digest = None
        if "latents" in last.arrays:
            digest = hashlib.sha256(last.arrays["latents"][row].tobytes()).hexdigest()
        yield ImageRecord(
            seed=seed,
            label=order.label,
            step=int(last.arrays["step"][row, 0]),
            latency_ms=last.latency_ms,
            batch=len(files),
            shapes={name: list(array.shape[1:]) for name, array in last.arrays.items()},
            file=paths[-1] if paths else None,
            previews=paths[:-1],
            latents_sha256=digest,
        )
