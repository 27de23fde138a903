"""The sections of a recipe. Defaults live here and nowhere else."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from treeq_export.errors import RecipeError
from treeq_export.recipe.fields import (
    MAX_AXIS,
    MAX_COUNT,
    MAX_SAMPLER_STEPS,
    Axis,
    Positive,
    Rate,
    Section,
    Seed,
    Threads,
)
from treeq_export.recipe.search_section import SearchSection
from treeq_export.targets.names import GraphName, TargetName


def _check_name(name: str) -> str:
    if not name.isprintable():
        raise ValueError("Write it without control characters and line ends")
    return name


def _check_square(size: Any) -> Any:
    if isinstance(size, list) or (isinstance(size, str) and "x" in size):
        raise ValueError("Latents are square: give one number, their height and width")
    return size


class ModelSection(Section):
    """Which checkpoint, and how it is called.

    Attributes:
        checkpoint: Folder in diffusers layout, or an original DiT `.pt` file.
        variant: Variant of the weight files, such as "fp16". null takes the files without a
            variant, or the only variant that exists.
        latent_size: Height and width of the latent. null takes sample_size of the model's config.
        num_text_tokens: Number of text tokens of random conditioning (PixArt, SD3, Flux). null is
            16.
        conditioning: Safetensors file with text embeddings, one row per prompt. null makes random
            embeddings.
    """

    checkpoint: str
    variant: str | None = None
    latent_size: Annotated[Axis | None, BeforeValidator(_check_square)] = None
    num_text_tokens: Axis | None = None
    conditioning: str | None = None


class PipelineScheduler(Section):
    """A diffusers scheduler, as a pipeline configures it.

    Attributes:
        class_name: Class of the scheduler in diffusers.
        config: Fields of scheduler_config.json. Other fields have the defaults of diffusers.
        mu: Shift of a flow with use_dynamic_shifting; it depends on the number of tokens.
        even_sigmas: Whether the pipeline itself sets sigma to 1, 1 - 1/n, ..., as that of Flux.
    """

    class_name: Literal[
        "FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"
    ]
    config: dict[str, Any] = {}
    mu: Annotated[float, Field(strict=False)] | None = None
    even_sigmas: bool = False


class SamplerSection(Section):
    """How images are sampled.

    Attributes:
        scheduler: "flow_match_euler" (rectified flow, shift 1), "ddim" (noise prediction), or
            "pipeline". A recipe without this key takes the scheduler of the checkpoint's
            scheduler/scheduler_config.json, or flow_match_euler if that file does not exist.
        pipeline_scheduler: Scheduler that "pipeline" stands for. null reads it from the
            checkpoint's scheduler/scheduler_config.json.
        steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; 1 is no guidance.
        batch_size: Images per forward pass. Results do not depend on it.
    """

    scheduler: Literal["flow_match_euler", "ddim", "pipeline"] = "flow_match_euler"
    pipeline_scheduler: PipelineScheduler | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_SAMPLER_STEPS)] = 25
    guidance_scale: Annotated[float, Field(ge=1.0, le=1e6, strict=False)] = 1.0
    batch_size: Axis = 50

    @property
    def definition(self) -> str | dict[str, Any]:
        """What `make_scheduler` takes."""
        if self.scheduler != "pipeline":
            return self.scheduler
        if self.pipeline_scheduler is None:
            raise RecipeError(
                "sampler.scheduler: pipeline, but none was read. Give sampler.pipeline_scheduler, "
                "or a pipeline's folder as model.checkpoint."
            )
        return self.pipeline_scheduler.model_dump(mode="json")


class CalibrateSection(Section):
    """How scales, codes and branches are found.

    Attributes:
        num_samples: Trajectories that are sampled from the model itself.
        num_clip_steps: Clipping ratios that are tried for each weight scale.
        max_tokens: Tokens to which each layer is fitted.
        inputs: "quantized" fits the layers in execution order. Each layer is fitted to give the
            full-precision output from the input that the quantized layers before it leave.
            "full_precision" fits each layer to clean inputs.
        num_rows: Network inputs that are carried from block to block for inputs "quantized".
        step: "gaussian" is the best step of a Gaussian; "fitted" scales it for least output error.
        bias_correction: Whether the bias takes the mean output error of every channel.
        rounding: "nearest" rounds for least weight error. "gptq" rounds for least output error on
            the kept tokens. "adaround" starts from the result of "gptq" and trains codes, scales
            and branches of each block for least error of the block's output.
        reconstruct_steps: Training steps of each block for rounding "adaround". A step has
            sampler.batch_size rows.
    """

    num_samples: Positive = 64
    num_clip_steps: Axis = 40
    max_tokens: Positive = 16384
    inputs: Literal["full_precision", "quantized"] = "quantized"
    num_rows: Positive = 1600
    step: Literal["gaussian", "fitted"] = "gaussian"
    bias_correction: bool = True
    rounding: Literal["nearest", "gptq", "adaround"] = "gptq"
    reconstruct_steps: Positive = 400

    @model_validator(mode="after")
    def _training_needs_quantized_inputs(self) -> Self:
        if self.rounding == "adaround" and self.inputs != "quantized":
            raise ValueError("rounding 'adaround' needs inputs 'quantized'")
        return self

    def without_training(self) -> Self:
        """Return the same for codes that are not trained: AdaRound starts from GPTQ's."""
        return self.model_copy(update={"rounding": "gptq"}) if self.rounding == "adaround" else self


class FinetuneSection(Section):
    """How the calibrated tensors are trained by distillation from full precision.

    The defaults were tried on the digits model (uniform W3A3, 200 steps of 32, one seed). Learning
    rates and on_policy hardly matter there; without the block outputs the Frechet distance is 1.40
    instead of 1.29 times that of full precision; with batches of 64 it is 1.15, after 300 steps
    1.21, so differences of 5 % mean nothing.

    Attributes:
        mode: "none" trains nothing. "peft" trains the tensors of `train` and keeps the codes. "qat"
            trains the codes too, by a straight-through estimator.
        train: Tensors that are trained in every layer that has them. Activation steps of
            token_absmax from 7 bits on are not trained.
        steps: Optimizer steps.
        batch_size: States per optimizer step. Guidance doubles the rows.
        num_trajectories: Trajectories that are walked at the same time.
        on_policy: Fraction of the trajectories that follow the quantized model.
        block_weight: Weight of the mean relative error of block outputs in the loss.
        branch_lr: Learning rate of branches, relative to the rms of each factor.
        scale_lr: Learning rate of the logarithm of weight scales and activation steps.
        bias_lr: Learning rate of biases, relative to the rms row norm of the weight.
        weight_lr: Learning rate of weights in mode "qat", in units of their scale.
        warmup: Fraction of the steps in which the learning rate rises. Then it falls as a cosine.
        clip_norm: Largest norm of the gradient.
        check_every: Steps between two measurements on held-out inputs. Each one saves the state.
        held_out_rows: Inputs that are held out. They come from trajectories of another seed.
        patience: Measurements without a new best after which training stops.
    """

    mode: Literal["none", "peft", "qat"] = "none"
    train: list[Literal["branch", "weight_scale", "activation_step", "bias"]] = [
        "branch",
        "weight_scale",
        "activation_step",
        "bias",
    ]
    steps: Positive = 300
    batch_size: Axis = 64
    num_trajectories: Positive = 256
    on_policy: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.5
    block_weight: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 1.0
    branch_lr: Rate = 0.02
    scale_lr: Rate = 0.005
    bias_lr: Rate = 0.005
    weight_lr: Rate = 0.005
    warmup: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.05
    clip_norm: Annotated[float, Field(gt=0, le=1e30, strict=False)] = 1.0
    check_every: Positive = 50
    held_out_rows: Positive = 256
    patience: Positive = 5


class CompileSection(Section):
    """Which graphs are written.

    Attributes:
        targets: "portable" (standard ONNX), "ort" (packed op with a function body), "tensorrt"
            (packed op as a plugin, float16 body), "tensorrt-native" (Q/DQ only, float16 body).
        external_data: Whether weights stand in a .data file. "auto" writes one above 1.5 GB.
        max_batch: Largest batch that a graph takes.
        opt_batch: Batch that TensorRT engines are tuned for (guidance of one image is two).
    """

    targets: Annotated[list[TargetName], Field(min_length=1)] = ["portable", "ort"]
    external_data: Literal["auto", "always", "never"] = "auto"
    max_batch: Annotated[int, Field(ge=2, le=MAX_AXIS)] = 256
    opt_batch: Axis = 2

    @model_validator(mode="after")
    def _opt_batch_is_a_batch(self) -> Self:
        if self.opt_batch > self.max_batch:
            raise ValueError(f"opt_batch {self.opt_batch} is above max_batch {self.max_batch}")
        return self


class ParityGates(Section):
    """Least parity of every target.

    Attributes:
        min_end_to_end_sqnr_db: Least SQNR of the network's output, in dB.
        half_margin_db: Margin of targets with a float16 body, in dB. Rounding to float16 moves
            codes that lie near a rounding border. So the reference is also run with all module
            outputs rounded to float16. If that does not reach min_end_to_end_sqnr_db, its SQNR less
            this margin is the limit.
        min_equal_code_fraction: Least fraction of equal codes of a layer on the reference's input.
        min_layer_sqnr_db: Least SQNR of a layer on the reference's input, in dB.
    """

    min_end_to_end_sqnr_db: Annotated[float, Field(strict=False)] = 40.0
    half_margin_db: Annotated[float, Field(ge=0, strict=False)] = 6.0
    min_equal_code_fraction: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.999
    min_layer_sqnr_db: Annotated[float, Field(strict=False)] = 40.0


class ValidateSection(Section):
    """How parity is measured.

    Attributes:
        batch_size: Images whose inputs are fed to the reference and to each target.
        gates: Limits of parity. A limit that is not met ends the run with status 3.
    """

    batch_size: Axis = 8
    gates: ParityGates = ParityGates()


class BenchSection(Section):
    """How speed is measured.

    Attributes:
        batch_sizes: Batches to time. One image with classifier-free guidance is a batch of two.
        rounds: Interleaved rounds. Each target runs once in a round.
        warmup: Rounds before the others that are not counted.
        threads: Threads of every runtime.
    """

    batch_sizes: Annotated[list[Axis], Field(min_length=1)] = [2]
    rounds: Annotated[int, Field(ge=3, le=MAX_COUNT)] = 20
    warmup: Positive = 3
    threads: Threads = 2


class QualityGates(Section):
    """Limits of image quality. A limit of null is not checked.

    Attributes:
        max_frechet_ratio: Largest Frechet distance, over that of full precision.
        min_class_accuracy: Least fraction of images that the classifier assigns to their label.
        min_psnr_db: Least PSNR against the full-precision images, in dB.
    """

    max_frechet_ratio: Annotated[float, Field(gt=0, strict=False)] | None = None
    min_class_accuracy: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    min_psnr_db: Annotated[float, Field(strict=False)] | None = None


class EvaluateSection(Section):
    """How image quality is measured.

    Attributes:
        num_samples: Images per seed, full precision and quantized.
        seeds: Seeds of the noise. Each seed is a complete measurement; the report gives the mean.
        classifier: ONNX file, images -> logits, features. null skips Frechet distance and accuracy.
        reference: Safetensors file with mean and covariance of the features of real images.
        runner: Producer of the quantized images: a compiled target, or "torch" (fake-quantized).
        baseline: "uniform" also samples uniform bits at the same budget, without search and
            training.
        gates: Limits of quality. A limit that is not met ends the run with status 3.
    """

    num_samples: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 100
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000)] = [0]
    classifier: str | None = None
    reference: str | None = None
    runner: Literal[GraphName, "torch"] = "portable"
    baseline: Literal["uniform"] | None = None
    gates: QualityGates = QualityGates()


class Recipe(Section):
    """A whole recipe.

    Attributes:
        name: Name of the run in reports and on the server.
        seed: Seed of everything random.
        model: Checkpoint, and how the model is called.
        sampler: Scheduler, steps and guidance.
        search: Formats of the layers.
        calibrate: Scales, codes and branches.
        finetune: Training by distillation.
        compile: Graphs to write.
        validate_: Parity and its limits.
        bench: Speed.
        evaluate: Image quality and its limits.
    """

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_name)]
    seed: Seed = 0
    model: ModelSection
    sampler: SamplerSection = SamplerSection()
    search: SearchSection = SearchSection()
    calibrate: CalibrateSection = CalibrateSection()
    finetune: FinetuneSection = FinetuneSection()
    compile: CompileSection = CompileSection()
    validate_: ValidateSection = Field(default=ValidateSection(), alias="validate")
    bench: BenchSection = BenchSection()
    evaluate: EvaluateSection = EvaluateSection()
