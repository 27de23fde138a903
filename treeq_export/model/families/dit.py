"""DiT: class labels in, no text."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from treeq_export.model.zoo import Denoiser

_LABELS: Mapping[str, tuple[int, ...]] = {"class_labels": ()}


class DiTDenoiser(Denoiser):
    """Class-conditional DiT: labels 0..num_classes-1, null class num_classes."""

    diffusers_class = "DiTTransformer2DModel"
    legacy_norm_type = "ada_norm_zero"
    takes_text = False

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]] = _LABELS,
        prompts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sample_shape, row_shapes, prompts)
        self.num_classes = cast(Any, model).config["num_embeds_ada_norm"]
        self.conditioning_source = "labels"

    @staticmethod
    def row_shapes_of(
        config: Mapping[str, Any], num_text_tokens: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of a label."""
        del config, num_text_tokens
        return _LABELS

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        sample, timestep, class_labels = inputs
        return self.model(sample, timestep=timestep, class_labels=class_labels, return_dict=False)[
            0
        ]

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return labels that cycle through the classes, whatever the seed."""
        del seed
        return {"class_labels": torch.arange(num) % self.num_classes}

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return the null class."""
        return {"class_labels": torch.full((num,), self.num_classes)}
