"""Images from a server into files: what `treeq-export client` does."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treeq_export.artefacts import atomic_path
from treeq_export.client.connection import Arrays, Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.picture import save_png
from treeq_export.client.responses import Response, responses
from treeq_export.client.sampler import SamplerInfo
from treeq_export.errors import ServeError
from treeq_export.records.images import ImageRecord, ImagesRecord

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageOrder:
    """What is wanted.

    Attributes:
        label: Class; None of text models.
        conditioning: One row of every text input; None of class-conditional models.
        seed: Of the first image; the others have the next ones.
        num: Images.
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
        connection: To the server.
        info: Its sampler.
        order: What is wanted.
        progress: Called with (step, steps) for every response of a stream.

    Returns:
        What was received and written.

    Raises:
        ServeError: The order does not fit the model, or the server refuses or fails.
        OutputError: A file cannot be written.
    """
    if order.num < 1:
        raise ServeError(f"num: received {order.num}, expected 1 or more.", kind="refused")
    images: list[ImageRecord] = []
    raw: list[NDArray[np.float32]] = []
    for seeds in _requests(order, info.max_batch):
        request = _Request(connection, info, order, seeds)
        last = request.run(progress)
        images += request.records(last)
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


def _requests(order: ImageOrder, max_batch: int) -> Iterator[list[int]]:
    """Yield the seeds of each request."""
    end = order.seed + order.num
    for first in range(order.seed, end, max_batch):
        yield list(range(first, min(first + max_batch, end)))


@dataclass(frozen=True)
class _Request:
    """One request of an order: the images of some seeds.

    Attributes:
        connection: To the server.
        info: Its sampler.
        order: What is wanted.
        seeds: One for each image.
        files: PNG files by seed, previews first.
    """

    connection: Connection
    info: SamplerInfo
    order: ImageOrder
    seeds: list[int]
    files: dict[int, list[str]] = field(default_factory=dict[int, list[str]])

    def run(self, progress: Progress) -> Response:
        """Send it, write the images of every response, and return the last one."""
        inputs = make_inputs(
            self.info,
            label=self.order.label,
            seed=self.seeds,
            steps=self.order.steps,
            guidance=self.order.guidance,
            conditioning=self.order.conditioning,
            preview_every=self.order.preview_every,
        )
        for response in responses(self.connection, self.info, inputs, self.order.outputs):
            if self.info.decoupled:
                step = int(response.arrays["step"].max())
                progress(step, self.order.steps or self.info.steps)
            if self.order.out is not None:
                self._write(response)
            if response.is_last:
                return response
        raise AssertionError("`responses` ends with the last one")

    def _write(self, response: Response) -> None:
        for row, seed in enumerate(self.seeds):
            step = int(response.arrays["step"][row, 0])
            path = self.order.file(seed, None if response.is_last else step)
            text = {
                "label": self.order.label,
                "seed": seed,
                "steps": self.order.steps or self.info.steps,
                "step": step,
                "guidance": (
                    self.info.guidance if self.order.guidance is None else self.order.guidance
                ),
                "model": self.info.model,
                "version": self.info.version or None,
                "target": self.info.target,
                "url": self.connection.url,
            }
            save_png(path, response.arrays["image"][row], text, self.order.scale)
            self.files.setdefault(seed, []).append(str(path))

    def records(self, last: Response) -> Iterator[ImageRecord]:
        """Yield a record for each image."""
        for row, seed in enumerate(self.seeds):
            *previews, file = self.files.get(seed, [None])
            digest = None
            if "latents" in last.arrays:
                digest = hashlib.sha256(last.arrays["latents"][row].tobytes()).hexdigest()
            yield ImageRecord(
                seed=seed,
                label=self.order.label,
                step=int(last.arrays["step"][row, 0]),
                latency_ms=last.latency_ms,
                batch=len(self.seeds),
                shapes={name: list(array.shape[1:]) for name, array in last.arrays.items()},
                file=file,
                previews=[path for path in previews if path is not None],
                latents_sha256=digest,
            )
