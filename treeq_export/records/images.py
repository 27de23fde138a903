"""Record of `treeq-export client`: images that a server has made."""

from pydantic import Field

from treeq_export.records.base import Record


class ImageRecord(Record):
    """One image.

    Attributes:
        seed: Seed of the image's noise.
        label: Class of the image; None for text models.
        step: Solver steps done.
        latency_ms: From sending its request to its last response; images of one request share it.
            With previews it includes writing them.
        batch: Images in its request.
        shapes: Shape of every received output, without the batch axis.
        file: PNG file; None if none was wanted.
        previews: PNG files of intermediate steps.
        latents_sha256: Digest of the raw sample's bytes (float32, C order); None if it
            was not asked for.
    """

    seed: int
    label: int | None
    step: int
    latency_ms: float
    batch: int
    shapes: dict[str, list[int]]
    file: str | None = None
    previews: list[str] = Field(default_factory=list)
    latents_sha256: str | None = None


class ImagesRecord(Record):
    """All images of one call.

    Attributes:
        url: The server, without credentials.
        model: Name of what was exported.
        version: Version of the sampler that is ready.
        mode: "inprocess" or "bls".
        target: Compiled target that runs.
        latents: .npy file with the raw samples (images, *sample shape); None where none was wanted.
        images: In order of their seeds.
    """

    url: str
    model: str
    version: str
    mode: str
    target: str
    latents: str | None
    images: list[ImageRecord]
