"""Stable Diffusion 3 and 3.5."""

import re

from treeq_export.model.zoo import Denoiser


class SD3Denoiser(Denoiser):
    """Stable Diffusion 3: joint attention over text and image tokens."""

    diffusers_class = "SD3Transformer2DModel"
    original_name = re.compile(r"(^|\.)joint_blocks\.\d+\.")
