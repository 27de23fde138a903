"""The four families of denoisers behind one calling convention.

A denoiser takes a noisy `sample`, a `timestep` in 0..1000 and its conditioning, all batched, by
position in the order of `input_names`, and returns the raw network output:

    DiT      class_labels (b,) int64
    PixArt   encoder_hidden_states (b, t, d), encoder_attention_mask (b, t)
    SD3      encoder_hidden_states (b, t, d), pooled_projections (b, p)
    Flux     the same, guidance (b,) where distilled; sample is packed, (b, tokens, channels)

All but class_labels are float32. What does not depend on the batch (Flux' position ids, PixArt's
resolution) is a constant inside, so that exported graphs have these inputs only.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from treeq_export.errors import CheckpointError, RecipeError
from treeq_export.model.checkpoint import Checkpoint
from treeq_export.model.conditioning import load_prompts, text_shapes
from treeq_export.recipe import ModelSection
from treeq_served.denoise import NUM_TIMESTEPS

_PIXELS_PER_LATENT = 8  # of the autoencoder that PixArt's resolution condition refers to
_NUM_TEXT_TOKENS = 16  # of random text
_UNSET_TEXT_TOKENS = (None, 16)  # run folders of earlier versions hold 16 where no key was set
_GUIDANCE = 3.5  # what guidance-distilled Flux is published with


class Denoiser(nn.Module):
    """A network with a fixed calling convention; the families fill in what differs.

    Args:
        model: The diffusers model.
        sample_shape: Shape of one sample without batch.
        row_shapes: Shape of one row of every text input, in call order.
        prompts: Text embeddings by input name, first axis prompts; None draws Gaussian ones.
    """

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
            As `make_conditioning`; text embeddings are zero.
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


class DiTDenoiser(Denoiser):
    """Class-conditional DiT: labels 0..num_classes-1, null class num_classes."""

    def __init__(self, model: nn.Module, sample_shape: tuple[int, ...]) -> None:
        super().__init__(model, sample_shape, {"class_labels": ()})
        self.num_classes: int = _config(model)["num_embeds_ada_norm"]
        self.conditioning_source = "labels"

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


class PixArtDenoiser(Denoiser):
    """Text-conditional PixArt; tokens whose mask is 0 are ignored."""

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]],
        prompts: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(model, sample_shape, row_shapes, prompts)
        self.use_size = bool(cast(Any, model).use_additional_conditions)
        side = float(sample_shape[-1] * _PIXELS_PER_LATENT)
        self.register_buffer("resolution", torch.tensor([[side, side]]), persistent=False)
        self.register_buffer("aspect_ratio", torch.tensor([[1.0]]), persistent=False)

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
            conditioning |= _ones_mask(conditioning)
        return conditioning

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return zero embeddings, all of them attended to."""
        conditioning = super().null_conditioning(num)
        return conditioning | _ones_mask(conditioning)


class SD3Denoiser(Denoiser):
    """Stable Diffusion 3: joint attention over text and image tokens."""

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


class FluxDenoiser(Denoiser):
    """Flux on packed 2 x 2 patches of a square latent."""

    def __init__(
        self,
        model: nn.Module,
        sample_shape: tuple[int, ...],
        row_shapes: Mapping[str, tuple[int, ...]],
        prompts: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(model, sample_shape, row_shapes, prompts)
        self.use_guidance: bool = _config(model)["guidance_embeds"]
        if self.use_guidance:
            self.input_names = (*self.input_names, "guidance")
        num_text_tokens = self.row_shapes["encoder_hidden_states"][0]
        self.register_buffer("img_ids", _grid_ids(sample_shape[0]), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(num_text_tokens, 3), persistent=False)

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

    def prediction(self, output: Tensor) -> Tensor:
        """Return the output: Flux learns no sigma."""
        return output

    def make_conditioning(self, num: int, seed: int) -> dict[str, Tensor]:
        """Return text embeddings, and the published guidance where the model takes one."""
        return super().make_conditioning(num, seed) | self._guidance(num)

    def null_conditioning(self, num: int) -> dict[str, Tensor]:
        """Return zero embeddings at the same guidance."""
        return super().null_conditioning(num) | self._guidance(num)

    def _guidance(self, num: int) -> dict[str, Tensor]:
        return {"guidance": torch.full((num,), _GUIDANCE)} if self.use_guidance else {}


def make_denoiser(model: nn.Module, checkpoint: Checkpoint, section: ModelSection) -> Denoiser:
    """Wrap a loaded model.

    Args:
        model: What `load_model` returned.
        checkpoint: Its checkpoint.
        section: The recipe's `model` section: latent size, text tokens, conditioning file.

    Returns:
        The denoiser in evaluation mode.

    Raises:
        RecipeError: The latent size is missing or does not fit the patches, or the model takes no
            text and the section has some, or the text is of another length than it says.
        CheckpointError: The conditioning file does not fit, or the output has other channels.
    """
    config = _config(model)
    _check_channels(checkpoint, config)
    if checkpoint.class_name == "DiTTransformer2DModel":
        for key, unset in (("conditioning", (None,)), ("num_text_tokens", _UNSET_TEXT_TOKENS)):
            if getattr(section, key) not in unset:
                raise RecipeError(
                    f"model.{key}: received {getattr(section, key)}, but DiTTransformer2DModel "
                    "takes class labels, no text. Remove the key."
                )
        return DiTDenoiser(model, _image_shape(config, section)).eval()
    num_text_tokens = section.num_text_tokens or _NUM_TEXT_TOKENS
    row_shapes = text_shapes(checkpoint.class_name, config, num_text_tokens)
    prompts = None
    if section.conditioning is not None:
        prompts = load_prompts(Path(section.conditioning), row_shapes)
        row_shapes = {name: tuple(rows.shape[1:]) for name, rows in prompts.items()}
        found = row_shapes["encoder_hidden_states"][0]
        if section.num_text_tokens not in (*_UNSET_TEXT_TOKENS, found):
            raise RecipeError(
                f"model.num_text_tokens: received {section.num_text_tokens}, but the prompts of "
                f"model.conditioning have {found}. Remove the key; the file decides."
            )
    if checkpoint.class_name == "FluxTransformer2DModel":
        return FluxDenoiser(model, _packed_shape(config, section), row_shapes, prompts).eval()
    shape = _image_shape(config, section)
    if checkpoint.class_name == "PixArtTransformer2DModel":
        return PixArtDenoiser(model, shape, row_shapes, prompts).eval()
    return SD3Denoiser(model, shape, row_shapes, prompts).eval()


def _config(model: nn.Module) -> Mapping[str, Any]:
    """Return the diffusers configuration with all defaults."""
    return cast(Any, model).config


def _check_channels(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    num_in = config["in_channels"]
    num_out = config["out_channels"] or num_in
    allowed = (num_in,) if checkpoint.class_name.startswith("Flux") else (num_in, 2 * num_in)
    if num_out not in allowed:
        raise CheckpointError(
            f"{checkpoint.path}: received out_channels {num_out} for in_channels {num_in}, "
            f"expected {' or '.join(map(str, allowed))}. Inpainting and control variants are not "
            "supported; use the base model."
        )


def _image_shape(config: Mapping[str, Any], section: ModelSection) -> tuple[int, int, int]:
    size = section.latent_size or config["sample_size"]
    patch = config["patch_size"]
    if size % patch:
        raise RecipeError(
            f"model.latent_size: received {size}, expected a multiple of the patch size {patch}. "
            f"The nearest is {max(round(size / patch), 1) * patch}."
        )
    largest = config.get("pos_embed_max_size")
    if largest is not None and size // patch > largest:
        raise RecipeError(
            f"model.latent_size: received {size}, expected at most {largest * patch}, "
            "the extent of the model's position table."
        )
    return (config["in_channels"], size, size)


def _packed_shape(config: Mapping[str, Any], section: ModelSection) -> tuple[int, int]:
    size = section.latent_size
    if size is None:
        raise RecipeError(
            "model.latent_size: missing, and a Flux config.json states none. "
            "Add the latent height, image height / 8, such as 128 for 1024 pixels."
        )
    if size % 2:
        raise RecipeError(
            f"model.latent_size: received {size}, expected an even number (Flux packs 2 x 2 "
            f"patches). The nearest is {size + 1}."
        )
    return ((size // 2) ** 2, config["in_channels"])


def _grid_ids(num_tokens: int) -> Tensor:
    """Return Flux' image position ids (num_tokens, 3): zero, row, column of a square grid."""
    side = round(num_tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def _ones_mask(conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder_attention_mask": torch.ones_like(conditioning["encoder_attention_mask"])}
