"""What all denoisers have in common: one calling convention.

A denoiser takes a noisy `sample`, a `timestep` in 0..1000 and its conditioning, all batched, by
position in the order of `input_names`, and returns the raw network output:

    DiT      class_labels (b,) int64
    PixArt   encoder_hidden_states (b, t, d), encoder_attention_mask (b, t)
    SD3      encoder_hidden_states (b, t, d), pooled_projections (b, p)
    Flux     the same, guidance (b,) where distilled; sample is packed, (b, tokens, channels)

All but class_labels are float32. What does not depend on the batch (Flux' position ids, PixArt's
resolution) is a constant inside, so that exported graphs have these inputs only.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treeq_export.errors import RecipeError
from treeq_served.denoise import NUM_TIMESTEPS


class Denoiser(nn.Module):
    """A network with a fixed calling convention; a family fills in what differs.

    Args:
        model: The diffusers model.
        sample_shape: Shape of one sample without batch.
        row_shapes: Shape of one row of every conditioning input, in call order.
        prompts: Text embeddings by input name, first axis prompts; None draws Gaussian ones.

    Attributes:
        diffusers_class: Name of the class in diffusers.
        legacy_norm_type: norm_type of a config.json that names diffusers' older class; None for a
            family that is younger.
        original_name: Pattern of tensor names that only the family's original code has.
        unused_tensors: Tensors of published checkpoints that the network does not have.
        takes_text: Whether prompts condition the network, not labels.
        may_learn_sigma: Whether the output may have the channels of a learned sigma.
        pipeline_sets_sigmas: Whether the family's pipeline sets sigma to 1, 1 - 1/n, ... itself.
        num_classes: Number of labels; 0 where text conditions the network.
        embedded_guidance: Guidance that the network takes as an input by default; None where it
            takes none.
    """

    diffusers_class: ClassVar[str]
    legacy_norm_type: ClassVar[str | None] = None
    original_name: ClassVar[re.Pattern[str] | None] = None
    unused_tensors: ClassVar[frozenset[str]] = frozenset()
    takes_text: ClassVar[bool] = True
    may_learn_sigma: ClassVar[bool] = True
    pipeline_sets_sigmas: ClassVar[bool] = False
    num_classes: int = 0
    embedded_guidance: float | None = None

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]],
        prompts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.class_name = type(model).__name__
        self.sample_shape = sample_shape
        self.row_shapes = dict(row_shapes)
        self.prompts = None if prompts is None else dict(prompts)
        self.conditioning_source = "random" if prompts is None else "file"
        self.input_names = ("sample", "timestep", *row_shapes)

    @staticmethod
    def row_shapes_of(
        config: Mapping[str, Any], num_text_tokens: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of one row of every conditioning input, in call order.

        Args:
            config: The diffusers configuration with all defaults.
            num_text_tokens: Length of the text.
        """
        return {
            "encoder_hidden_states": (num_text_tokens, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    @classmethod
    def sample_shape_of(cls, config: Mapping[str, Any], latent_size: int | None) -> tuple[int, ...]:
        """Return the shape of one sample, (channels, size, size).

        Args:
            config: The diffusers configuration with all defaults.
            latent_size: Height and width of the latent; None takes the configuration's.

        Raises:
            RecipeError: The size is missing, or does not fit the network.
        """
        size = latent_size or config["sample_size"]
        patch = cls.patch_size_of(config)
        if size % patch:
            raise RecipeError(
                f"model.latent_size: received {size}, expected a multiple of the patch size "
                f"{patch}. The nearest is {max(round(size / patch), 1) * patch}."
            )
        largest = config.get("pos_embed_max_size")
        if largest is not None and size // patch > largest:
            raise RecipeError(
                f"model.latent_size: received {size}, expected at most {largest * patch}, "
                "the extent of the model's position table."
            )
        return (config["in_channels"], size, size)

    @staticmethod
    def patch_size_of(config: Mapping[str, Any]) -> int:
        """Return the latents along each side of a token."""
        return int(config.get("patch_size") or 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the raw network output.

        Args:
            inputs: Tensors in the order of `input_names`, each with a leading batch axis.

        Returns:
            (b, *sample_shape) float32, with more channels where the network learned sigma.
        """
        raise NotImplementedError

    def exportable(self) -> AbstractContextManager[None]:
        """Return a context in which the network has only what torch.onnx exports."""
        return nullcontext()

    @property
    def prediction_channels(self) -> int | None:
        """Channels of the output that are the prediction; None takes all."""
        return self.sample_shape[0] if self.may_learn_sigma else None

    def prediction(self, output: Tensor) -> Tensor:
        """Return the predicted noise or velocity: the output without learned-sigma channels.

        Args:
            output: Raw network output, channels on axis 1.

        Returns:
            (b, *sample_shape), same dtype.
        """
        return output[:, : self.prediction_channels]

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return all inputs but sample and timestep.

        Args:
            num: Number of rows.
            seed: Seed of random text embeddings; unused for labels and embeddings from a file.

        Returns:
            Input name to tensor with `num` rows; labels and prompts cycle.
        """
        if self.prompts is not None:
            return {
                name: rows[torch.arange(num) % len(rows)] for name, rows in self.prompts.items()
            }
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn((num, *shape), generator=generator)
            for name, shape in self.row_shapes.items()
        }

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return the conditioning of the unconditional half of classifier-free guidance.

        Args:
            num: Number of rows.

        Returns:
            Input name to tensor with `num` rows; text embeddings are zero.
        """
        return {name: torch.zeros(num, *shape) for name, shape in self.row_shapes.items()}

    def make_example_inputs(self, batch: int, seed: int) -> dict[str, Tensor]:
        """Return valid inputs: Gaussian sample, uniform timesteps, conditioning.

        Args:
            batch: Number of rows.
            seed: The same seed gives the same inputs.

        Returns:
            Input name to tensor, in the order of `input_names`.
        """
        generator = torch.Generator().manual_seed(seed)
        return {
            "sample": torch.randn((batch, *self.sample_shape), generator=generator),
            "timestep": torch.rand(batch, generator=generator) * NUM_TIMESTEPS,
            **self.make_conditioning(batch, seed + 1),
        }
