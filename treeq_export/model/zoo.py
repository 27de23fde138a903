"""What all families of denoisers have in common: one calling convention.

A denoiser takes a noisy `sample`, a `timestep` in 0..1000 and its conditioning, all batched, by
position in the order of `input_names`, and returns the raw network output. All but labels (int64)
are float32. What does not depend on the batch (Flux' position ids, PixArt's resolution) is a
constant inside, so that exported graphs have these inputs only.
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
        diffusers_class: Name of the network's class in diffusers.
        legacy_norm_type: norm_type of a config.json that names diffusers' older class; None for a
            family that is younger.
        original_name: Pattern of tensor names that only the family's original code has.
        unused_tensors: Tensors of published checkpoints that the network does not have.
        may_learn_sigma: Whether the output may have the channels of a learned sigma.
        pipeline_sets_sigmas: Whether the family's pipeline sets sigma to 1, 1 - 1/n, ... itself.
        pipeline_patch: Latents that the pipeline packs into a token, along each side; None where
            the network does.
        num_classes: Number of labels; 0 where text conditions the network.
        constants: Inputs that hold one number, unless the prompts have them.
    """

    diffusers_class: ClassVar[str]
    legacy_norm_type: ClassVar[str | None] = None
    original_name: ClassVar[re.Pattern[str] | None] = None
    unused_tensors: ClassVar[frozenset[str]] = frozenset()
    may_learn_sigma: ClassVar[bool] = True
    pipeline_sets_sigmas: ClassVar[bool] = False
    pipeline_patch: ClassVar[int | None] = None

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
        self.num_classes = 0
        self.constants: dict[str, float] = {}
        self.prepare(getattr(model, "config", {}))
        self.input_names = tuple({"sample": 0, "timestep": 0, **self.row_shapes, **self.constants})

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Set what the family adds: labels, constants and buffers.

        Args:
            config: The diffusers configuration with all defaults.
        """

    @staticmethod
    def row_shapes_of(config: Mapping[str, Any], num_tokens: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of one row of every conditioning input, in call order.

        Args:
            config: The diffusers configuration with all defaults.
            num_tokens: Length of the text.
        """
        return {
            "encoder_hidden_states": (num_tokens, config["joint_attention_dim"]),
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
        patch = config["patch_size"]
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

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the raw network output.

        Args:
            inputs: Tensors in the order of `input_names`, each with a leading batch axis.

        Returns:
            (b, *sample_shape) float32, with more channels where the network learned sigma.
        """
        given = self.arguments(dict(zip(self.input_names, inputs, strict=True)))
        return self.model(hidden_states=given.pop("sample"), **given, return_dict=False)[0]

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the diffusers model, whose hidden_states is called sample here.

        Args:
            inputs: The denoiser's inputs by name.
        """
        return dict(inputs)

    def exportable(self) -> AbstractContextManager[None]:
        """Return a context in which the network has only what torch.onnx exports."""
        return nullcontext()

    def prediction(self, output: Tensor) -> Tensor:
        """Return the predicted noise or velocity: the output without learned-sigma channels.

        Args:
            output: Raw network output, channels on axis 1.

        Returns:
            (b, *sample_shape), same dtype.
        """
        return output[:, : self.sample_shape[0]]

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return all inputs but sample and timestep.

        Args:
            num: Number of rows.
            seed: Seed of random text embeddings; unused for labels and embeddings from a file.

        Returns:
            Input name to tensor with `num` rows; labels and prompts cycle.
        """
        if self.prompts is not None:
            index = torch.arange(num) % len(next(iter(self.prompts.values())))
            given = {name: rows[index] for name, rows in self.prompts.items()}
            return given | {n: c for n, c in self._constant_rows(num).items() if n not in given}
        generator = torch.Generator().manual_seed(seed)
        random = {
            name: torch.randn((num, *shape), generator=generator)
            for name, shape in self.row_shapes.items()
        }
        return random | self._constant_rows(num)

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return the conditioning of the unconditional half of classifier-free guidance.

        Args:
            num: Number of rows.

        Returns:
            Input name to tensor with `num` rows; text embeddings are zero.
        """
        zeros = {name: torch.zeros(num, *shape) for name, shape in self.row_shapes.items()}
        return zeros | self._constant_rows(num)

    def _constant_rows(self, num: int) -> dict[str, Tensor]:
        return {
            name: torch.full((num, *self.row_shapes.get(name, ())), value)
            for name, value in self.constants.items()
        }

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
