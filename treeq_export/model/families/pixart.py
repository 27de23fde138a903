"""PixArt: a caption with a mask, and the resolution of the image as a condition."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from treeq_export.model.zoo import Denoiser

_PIXELS_PER_LATENT = 8  # of the autoencoder that the resolution refers to


class PixArtDenoiser(Denoiser):
    """Text-conditional PixArt; tokens whose mask is 0 are ignored, random text has none of them."""

    diffusers_class = "PixArtTransformer2DModel"
    legacy_norm_type = "ada_norm_single"
    # The null caption of training, which pipelines encode instead; diffusers leaves it out as well.
    unused_tensors = frozenset({"caption_projection.y_embedding"})

    def prepare(self, config: Mapping[str, Any]) -> None:
        """See `Denoiser.prepare`."""
        self.constants = {"encoder_attention_mask": 1.0}
        side = float(self.sample_shape[-1] * _PIXELS_PER_LATENT)
        self.register_buffer("resolution", torch.tensor([[side, side]]), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[1.0]]), persistent=False)

    @staticmethod
    def row_shapes_of(config: Mapping[str, Any], num_tokens: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of a caption and of its mask."""
        width = config["caption_channels"] or config["cross_attention_dim"]
        return {
            "encoder_hidden_states": (num_tokens, width),
            "encoder_attention_mask": (num_tokens,),
        }

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """See `Denoiser.arguments`."""
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if cast(Any, self.model).use_additional_conditions:
            buffers = {name: self.get_buffer(name) for name in size}
            batch = inputs["sample"].shape[0]
            size = {name: each.expand(batch, each.shape[1]) for name, each in buffers.items()}
        return inputs | {"added_cond_kwargs": size}

    @contextmanager
    def exportable(self) -> Iterator[None]:
        """Replace fused attention, which does not export together with a mask, by plain products.

        These hold the scores of all pairs of tokens, which at 1024 pixels take 1 GB a row.
        """
        from diffusers.models.attention_processor import AttnProcessor

        model = cast(Any, self.model)
        before = model.attn_processors
        model.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            model.set_attn_processor(before)
