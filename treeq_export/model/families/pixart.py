"""PixArt: a caption with a mask, and the resolution of the image as a condition."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from treeq_export.model.zoo import Denoiser

_PIXELS_PER_LATENT = 8  # of the autoencoder that the resolution refers to
_MASK = "encoder_attention_mask"


class PixArtDenoiser(Denoiser):
    """Text-conditional PixArt; tokens whose mask is 0 are ignored."""

    diffusers_class = "PixArtTransformer2DModel"
    legacy_norm_type = "ada_norm_single"
    # The null caption of training, which pipelines encode instead; diffusers leaves it out as well.
    unused_tensors = frozenset({"caption_projection.y_embedding"})

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]],
        prompts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sample_shape, row_shapes, prompts)
        self.use_size = bool(cast(Any, model).use_additional_conditions)
        side = float(sample_shape[-1] * _PIXELS_PER_LATENT)
        self.register_buffer("resolution", torch.tensor([[side, side]]), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[1.0]]), persistent=False)

    @staticmethod
    def row_shapes_of(
        config: Mapping[str, Any], num_text_tokens: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of a caption and of its mask."""
        width = config["caption_channels"] or config["cross_attention_dim"]
        return {"encoder_hidden_states": (num_text_tokens, width), _MASK: (num_text_tokens,)}

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        sample, timestep, encoder_hidden_states, mask = inputs
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.use_size:
            batch = sample.shape[0]
            size = {
                "resolution": cast(Tensor, self.resolution).expand(batch, 2),
                "aspect_ratio": cast(Tensor, self.aspect_ratio).expand(batch, 1),
            }
        return self.model(
            sample,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=size,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

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

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return text embeddings; random ones have no masked tokens."""
        conditioning = super().make_conditioning(num, seed)
        if self.prompts is None:
            conditioning[_MASK] = torch.ones_like(conditioning[_MASK])
        return conditioning

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return zero embeddings, all of them attended to."""
        conditioning = super().null_conditioning(num)
        return conditioning | {_MASK: torch.ones_like(conditioning[_MASK])}
