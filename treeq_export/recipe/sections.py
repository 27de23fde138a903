"""The sections of a recipe. Defaults live here and nowhere else."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from treeq_export.errors import RecipeError
from treeq_export.ops import MAX_BITS, MIN_BITS
from treeq_export.quant.spec import Bits, BranchFormat

# Upper ends that no use comes near, so that every number fits what computes with it.
MAX_COUNT = 10_000_000
MAX_AXIS = 1 << 16
MAX_SAMPLER_STEPS = 1000  # of the schedules that models are trained with
MAX_SEED = 1 << 62  # offsets are added, and generators take 64 bits
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Axis = Annotated[int, Field(ge=1, le=MAX_AXIS)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Rate = Annotated[float, Field(gt=0, le=1e6, strict=False)]
Target = Literal["portable", "ort", "tensorrt", "tensorrt-native"]
AverageBits = Annotated[float, Field(ge=MIN_BITS, le=MAX_BITS, strict=False)]


def _check_name(name: str) -> str:
    if not name.isprintable():
        raise ValueError("Write it without control characters and line ends")
    return name


def _check_square(size: Any) -> Any:
    if isinstance(size, list) or (isinstance(size, str) and "x" in size):
        raise ValueError("Latents are square: give one number, their height and width")
    return size


class Section(BaseModel):
    """Base of all sections: strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which checkpoint, and how it is called.

    Attributes:
        checkpoint: Folder in diffusers layout, or an original DiT `.pt` file.
        variant: Of the weight files, such as "fp16"; None takes those without one, or the only
            variant there is.
        latent_size: Height and width of the latent; None takes the config's sample_size.
        num_text_tokens: Text tokens of random conditioning (PixArt, SD3, Flux); None is 16.
        conditioning: Safetensors file with text embeddings, one row per prompt; None is random.
    """

    checkpoint: str
    variant: str | None = None
    latent_size: Annotated[Axis | None, BeforeValidator(_check_square)] = None
    num_text_tokens: Axis | None = None
    conditioning: str | None = None


class PipelineScheduler(Section):
    """A diffusers scheduler, as a pipeline configures it.

    Attributes:
        class_name: The class.
        config: Fields of its scheduler_config.json; others have diffusers' defaults.
        mu: Shift of a flow with use_dynamic_shifting, which depends on the number of tokens.
        even_sigmas: Whether the pipeline itself sets sigma to 1, 1 - 1/n, ..., as Flux' does.
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
            "pipeline". Where the recipe says nothing it is the one in the checkpoint's
            scheduler/scheduler_config.json, and flow_match_euler where there is no such file.
        pipeline_scheduler: What "pipeline" is; read from that file where the recipe has none.
        steps: Number of denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        batch_size: Images per forward pass; results do not depend on it.
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


class BudgetSection(Section):
    """What a searched assignment may cost; every limit that is set has to hold.

    Attributes:
        weight_bits: Average weight bits, weighted by number of weights.
        activation_bits: Average activation bits, weighted by number of weights.
        size_bytes: Packed codes, scales and branches of all quantized layers.
    """

    weight_bits: AverageBits | None = None
    activation_bits: AverageBits | None = None
    size_bytes: Annotated[int, Field(ge=1, le=1 << 60)] | None = None


class BranchBudget(Section):
    """Let the search choose each layer's branch among Monarch shapes of equal parameters.

    Attributes:
        parameter_fraction: Branch parameters over the layer's weights, an upper limit.
        grids: Largest number of blocks along each axis; the candidates are powers of two up to it.
    """

    parameter_fraction: Annotated[float, Field(gt=0, lt=1, strict=False)]
    grids: Axis = 8


class SearchSection(Section):
    """Which formats the layers get.

    Attributes:
        strategy: "uniform": the same formats for every layer; "tss": TreeQ's tree-structured
            search; "integer_programming" and "greedy": baselines of the search.
        weight_bits: 2..8, of strategy "uniform" without a budget.
        activation_bits: 2..8, or None to keep activations in floating point; likewise.
        budget: What the assignment may cost; "uniform" spreads two neighbouring widths evenly.
        weight_candidates: Weight bits that the search may choose from.
        activation_candidates: Activation bits, likewise; at most 16 pairs in all.
        noise: Environmental Noise Guidance, lambda in 0..1: 1 measures every segment on inputs as
            the quantized layers before it leave them (PTQ), 0 on clean ones (before PEFT or QAT).
        keep: Configurations that a node keeps.
        num_samples: Trajectories that inputs are taken from.
        num_rows: Network inputs (sample and timestep) that every configuration is measured on.
        num_final_rows: Inputs of other trajectories that "tss" compares its finalists on; 0 takes
            those that all else is measured on.
        calibrated_finalists: How many of them are calibrated before the last choice; 0 chooses
            without, which for large models saves hours.
        num_probes: Random directions of the prediction along which a segment's error is measured
            (model/sensitivity.py); 0 takes the mean squared error of its output, as TreeQ does.
        refine: Least relative gain of a last exchange of bits between leaves on the whole network;
            None leaves it out.
        executor: "local", or "ray" for several processes or machines.
        num_workers: Ray workers.
        threads: Torch threads of each process; another number may round differently.
        activation_scale: "auto" is token_rms below 7 bits and token_absmax from 7 on.
        group_size: Input channels that share a weight scale; None is one scale per channel.
        rotation_group: Hadamard group: "auto" is, for each layer, the largest power of two up to
            128 that divides its in_features; a number has to divide those of every layer.
        branch: Shape of the Monarch branch; None is no branch.
        branch_budget: Choose each layer's branch by measured output error instead.
        exclude: Glob patterns of layers that stay in floating point.
    """

    strategy: Literal["uniform", "tss", "integer_programming", "greedy"] = "uniform"
    weight_bits: Bits = 4
    activation_bits: Bits | None = 4
    budget: BudgetSection | None = None
    weight_candidates: Annotated[list[Bits], Field(min_length=1)] = [2, 3, 4, 6]
    activation_candidates: Annotated[list[Bits], Field(min_length=1)] = [2, 3, 4, 6]
    noise: Annotated[float, Field(ge=0, le=1, strict=False)] = 1.0
    keep: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 16
    num_samples: Positive = 32
    num_rows: Positive = 128
    num_final_rows: NonNegative = 256
    calibrated_finalists: NonNegative = 4
    num_probes: NonNegative = 16
    refine: Annotated[float, Field(ge=0, lt=1, strict=False)] | None = 1e-3
    executor: Literal["local", "ray"] = "local"
    num_workers: Threads = 2
    threads: Threads = 1
    activation_scale: Literal["auto", "token_rms", "token_absmax", "tensor_static"] = "auto"
    group_size: Positive | None = None
    rotation_group: Positive | Literal["auto"] = "auto"
    branch: BranchFormat | None = BranchFormat(b_in=1, b_out=1, rank=8)
    branch_budget: BranchBudget | None = None
    exclude: list[str] = []


def strategy_options(section: SearchSection) -> dict[str, Any]:
    """Return what a plan records of the search: all that can change it, not where it ran."""
    return section.model_dump(mode="json", exclude={"executor", "num_workers"})


class CalibrateSection(Section):
    """How scales, codes and branches are found.

    Attributes:
        num_samples: Trajectories sampled from the model itself.
        num_clip_steps: Points of the clipping grid of the weight scales.
        max_tokens: Tokens per layer that the layers are fitted to.
        inputs: "quantized" fits the layers in execution order, each to give the full-precision
            output from what the quantized layers before it and its own activation quantizer leave
            of its input; "full_precision" fits each to clean inputs.
        num_rows: Network inputs that "quantized" carries from block to block.
        step: "gaussian" is the best step of a Gaussian; "fitted" scales it for least output error.
        bias_correction: Let the bias take the mean output error of every channel.
        rounding: "nearest" rounds the residual weight for least weight error, "gptq" for least
            output error on the kept tokens; "adaround" goes on from there and trains the codes of
            each block, and its other tensors, for least error of the block's output.
        reconstruct_steps: Training steps of each block for "adaround", of sampler.batch_size rows.
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
        mode: "none"; "peft": weight codes stay frozen; "qat": they are trained too, by a
            straight-through estimator.
        train: What is trained beside QAT's codes, in every layer that has it; activation steps of
            token_absmax from 7 bits on stay.
        steps: Optimizer steps.
        batch_size: States per step; guidance doubles the rows.
        num_trajectories: Trajectories that are walked at the same time.
        on_policy: Fraction of them that follow the quantized model instead of full precision.
        block_weight: Weight of the mean relative error of block outputs in the loss.
        branch_lr: Learning rate of the branch, relative to each factor's rms.
        scale_lr: Of the logarithm of weight scales and activation steps.
        bias_lr: Of biases, relative to the rms row norm of the weight.
        weight_lr: Of QAT's weights, in units of their step.
        warmup: Fraction of the steps in which the learning rate rises; then it falls as a cosine.
        clip_norm: Largest norm of the gradient.
        check_every: Steps between measurements on held-out inputs, when the state is saved too.
        held_out_rows: Inputs that are held out, from trajectories of another seed.
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
        external_data: "auto" writes a .data file above 1.5 GB of weights.
        max_batch: Upper end of the dynamic batch.
        opt_batch: Batch that TensorRT engines are tuned for (guidance of one image is two).
    """

    targets: Annotated[list[Target], Field(min_length=1)] = ["portable", "ort"]
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
        min_end_to_end_sqnr_db: Of the network's output.
        half_margin_db: A float16 body moves codes that lie near a rounding border, more the fewer
            the bits. Where the reference itself, with all outputs of its modules rounded to
            float16, does not reach min_end_to_end_sqnr_db, a target with such a body may be this
            much below the reference so rounded.
        min_equal_code_fraction: Of every layer on the reference's input.
        min_layer_sqnr_db: Of every layer on the reference's input.
    """

    min_end_to_end_sqnr_db: Annotated[float, Field(strict=False)] = 40.0
    half_margin_db: Annotated[float, Field(ge=0, strict=False)] = 6.0
    min_equal_code_fraction: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.999
    min_layer_sqnr_db: Annotated[float, Field(strict=False)] = 40.0


class ValidateSection(Section):
    """How parity is measured.

    Attributes:
        batch_size: Images whose inputs are fed to both sides.
        gates: Limits; one not met ends the run with status 3.
    """

    batch_size: Axis = 8
    gates: ParityGates = ParityGates()


class BenchSection(Section):
    """How speed is measured.

    Attributes:
        batch_sizes: Batches to time (a batch of classifier-free guidance is two images).
        rounds: Interleaved rounds; each target runs once a round.
        warmup: Rounds that are not counted.
        threads: Threads of every runtime.
    """

    batch_sizes: Annotated[list[Axis], Field(min_length=1)] = [2]
    rounds: Annotated[int, Field(ge=3, le=MAX_COUNT)] = 20
    warmup: Positive = 3
    threads: Threads = 2


class QualityGates(Section):
    """Limits of image quality; None is not checked."""

    max_frechet_ratio: Annotated[float, Field(gt=0, strict=False)] | None = None
    min_class_accuracy: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    min_psnr_db: Annotated[float, Field(strict=False)] | None = None


class EvaluateSection(Section):
    """How image quality is measured.

    Attributes:
        num_samples: Images per seed, for full precision and quantized alike.
        seeds: One complete measurement each; the report gives the mean.
        classifier: ONNX file, images -> logits, features; None skips Frechet distance and accuracy.
        reference: Safetensors file with mean and covariance of real images' features.
        runner: What produces the quantized images: a compiled target, or "torch" (fake-quantized).
        baseline: "uniform" also samples what the budget gives without search and finetune.
        gates: Limits; one not met ends the run with status 3.
    """

    num_samples: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 100
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000)] = [0]
    classifier: str | None = None
    reference: str | None = None
    runner: Literal["portable", "ort", "torch"] = "portable"
    baseline: Literal["uniform"] | None = None
    gates: QualityGates = QualityGates()


class Recipe(Section):
    """A whole recipe."""

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
