"""Flux on packed 2 x 2 patches of a square latent."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treeq_export.errors import RecipeError
from treeq_export.model.zoo import Denoiser
from treeq_served.denoise import NUM_TIMESTEPS

_GUIDANCE = 3.5  # what guidance-distilled Flux is published with


class FluxDenoiser(Denoiser):
    """Flux; a distilled model takes guidance (b,) as an input."""

    diffusers_class = "FluxTransformer2DModel"
    original_name = re.compile(r"(^|\.)(double|single)_blocks\.\d+\.")
    may_learn_sigma = False
    pipeline_sets_sigmas = True
    pipeline_patch = 2

    def prepare(self, config: Mapping[str, Any]) -> None:
        """See `Denoiser.prepare`."""
        if config["guidance_embeds"]:
            self.constants = {"guidance": _GUIDANCE}
        side = round(self.sample_shape[0] ** 0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        num_tokens = self.row_shapes["encoder_hidden_states"][0]
        self.register_buffer("img_ids", ids, persistent=False)
        self.register_buffer("txt_ids", torch.zeros(num_tokens, 3), persistent=False)

    @classmethod
    def sample_shape_of(cls, config: Mapping[str, Any], latent_size: int | None) -> tuple[int, ...]:
        """Return (tokens, channels); a Flux config.json states no size."""
        if latent_size is None:
            raise RecipeError(
                "model.latent_size: missing, and a Flux config.json states none. "
                "Add the latent height, image height / 8, such as 128 for 1024 pixels."
            )
        if latent_size % 2:
            raise RecipeError(
                f"model.latent_size: received {latent_size}, expected an even number (Flux packs "
                f"2 x 2 patches). The nearest is {latent_size + 1}."
            )
        return ((latent_size // 2) ** 2, config["in_channels"])

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """See `Denoiser.arguments`."""
        timestep = inputs["timestep"] / NUM_TIMESTEPS  # Flux itself counts 0..1
        return inputs | {"timestep": timestep, "img_ids": self.img_ids, "txt_ids": self.txt_ids}
