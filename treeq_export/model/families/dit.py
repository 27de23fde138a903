"""DiT: class labels in, no text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treeq_export.model.zoo import Denoiser

LABELS: Mapping[str, tuple[int, ...]] = {"class_labels": ()}


class DiTDenoiser(Denoiser):
    """Class-conditional DiT: labels 0..num_classes-1, null class num_classes."""

    diffusers_class = "DiTTransformer2DModel"
    legacy_norm_type = "ada_norm_zero"

    def prepare(self, config: Mapping[str, Any]) -> None:
        """See `Denoiser.prepare`."""
        self.num_classes = config["num_embeds_ada_norm"]
        self.conditioning_source = "labels"

    @staticmethod
    def row_shapes_of(config: Mapping[str, Any], num_tokens: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of a label."""
        del config, num_tokens
        return LABELS

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return labels that cycle through the classes, whatever the seed."""
        del seed
        return {"class_labels": torch.arange(num) % self.num_classes}

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return the null class."""
        return {"class_labels": torch.full((num,), self.num_classes)}
