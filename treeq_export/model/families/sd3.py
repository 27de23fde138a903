"""Stable Diffusion 3 and 3.5."""

import re

from torch import Tensor

from treeq_export.model.zoo import Denoiser


class SD3Denoiser(Denoiser):
    """Stable Diffusion 3: joint attention over text and image tokens."""

    diffusers_class = "SD3Transformer2DModel"
    original_name = re.compile(r"(^|\.)joint_blocks\.\d+\.")

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        sample, timestep, encoder_hidden_states, pooled_projections = inputs
        return self.model(
            hidden_states=sample,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]
