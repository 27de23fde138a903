"""The decoder of an AutoencoderKL: latents in, images out."""

from __future__ import annotations  # of classes that only the server has

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from treeq_served.check_manifest import check_model
from treeq_served.denoise import pixels_from_samples


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check the manifest and load the autoencoder.

        Args:
            args: model_repository, model_version and more, by Triton.

        Raises:
            ValueError: The repository is not what its manifest says.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        folder = Path(args["model_repository"])
        check_model(folder, args["model_version"])
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        vae: Any = AutoencoderKL.from_pretrained(str(folder / args["model_version"] / "vae"))
        self.vae = vae.to(self.device).eval()

    @torch.no_grad()
    def execute(
        self, requests: Sequence[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        """Decode the latents of all requests as one batch.

        Args:
            requests: InferenceRequest objects.

        Returns:
            One response for each request.
        """
        inputs = [
            pb_utils.get_input_tensor_by_name(request, "latents").as_numpy() for request in requests
        ]
        latents = torch.from_numpy(np.concatenate(inputs)).to(self.device)
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        decoded = self.vae.decode(latents, return_dict=False)[0].float().cpu().numpy()
        images = np.ascontiguousarray(pixels_from_samples(decoded))
        parts = np.split(images, np.cumsum([len(array) for array in inputs])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("image", part)]) for part in parts]
