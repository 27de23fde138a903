"""Flux on packed 2 x 2 patches of a square latent."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from treeq_export.errors import RecipeError
from treeq_export.model.zoo import Denoiser
from treeq_served.denoise import NUM_TIMESTEPS

_GUIDANCE = 3.5  # what guidance-distilled Flux is published with
_PATCH = 2


class FluxDenoiser(Denoiser):
    """Flux; a distilled model takes guidance (b,) as an input and predicts no sigma."""

    diffusers_class = "FluxTransformer2DModel"
    original_name = re.compile(r"(^|\.)(double|single)_blocks\.\d+\.")
    may_learn_sigma = False
    pipeline_sets_sigmas = True

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]],
        prompts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sample_shape, row_shapes, prompts)
        if cast(Any, model).config["guidance_embeds"]:
            self.embedded_guidance = _GUIDANCE
            self.input_names = (*self.input_names, "guidance")
        num_text_tokens = self.row_shapes["encoder_hidden_states"][0]
        self.register_buffer("img_ids", _grid_ids(sample_shape[0]), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(num_text_tokens, 3), persistent=False)

    @classmethod
    def sample_shape_of(cls, config: Mapping[str, Any], latent_size: int | None) -> tuple[int, ...]:
        """Return (tokens, channels); a Flux config.json states no size."""
        if latent_size is None:
            raise RecipeError(
                "model.latent_size: missing, and a Flux config.json states none. "
                "Add the latent height, image height / 8, such as 128 for 1024 pixels."
            )
        if latent_size % _PATCH:
            raise RecipeError(
                f"model.latent_size: received {latent_size}, expected an even number (Flux packs "
                f"2 x 2 patches). The nearest is {latent_size + 1}."
            )
        return ((latent_size // _PATCH) ** 2, config["in_channels"])

    @staticmethod
    def patch_size_of(config: Mapping[str, Any]) -> int:
        """Return 2: the pipeline packs, so config.json says 1."""
        del config
        return _PATCH

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        sample, timestep, encoder_hidden_states, pooled_projections, *guidance = inputs
        return self.model(
            hidden_states=sample,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep / NUM_TIMESTEPS,  # Flux itself counts 0..1
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            guidance=guidance[0] if guidance else None,
            return_dict=False,
        )[0]

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return text embeddings, and the published guidance where the model takes one."""
        return super().make_conditioning(num, seed) | self._guidance(num)

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return zero embeddings at the same guidance."""
        return super().null_conditioning(num) | self._guidance(num)

    def _guidance(self, num: int) -> dict[str, Tensor]:
        guidance = self.embedded_guidance
        return {} if guidance is None else {"guidance": torch.full((num,), guidance)}


def _grid_ids(num_tokens: int) -> Tensor:
    """Return Flux' image position ids (num_tokens, 3): zero, row, column of a square grid."""
    side = round(num_tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
