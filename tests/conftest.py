"""Fixtures that several test files share.

Tiny checkpoints of all families, the digits sample, calibrated and compiled runs of the tiny ones,
quantized layers made by hand, with their reference arithmetic, a complete run, and a driver of the
command line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from treeq_export.calibrate import run_calibrate
from treeq_export.cli import main
from treeq_export.compile.export import export_graph
from treeq_export.compile.stage import run_compile
from treeq_export.model.checkpoint import Checkpoint, load_model, open_checkpoint
from treeq_export.model.quantized import quantize_model
from treeq_export.model.zoo import Denoiser, make_denoiser
from treeq_export.plan import Plan, Tensors, load_tensors
from treeq_export.quant import numerics
from treeq_export.quant.packing import pack
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat
from treeq_export.recipe import ModelSection, Recipe
from treeq_export.records import CompileRecord
from treeq_export.search.stage import run_search
from treeq_export.workspace import Workspace

TINY_LATENT = 8
# All in_features of the blocks' linears are multiples of 64.
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "num_embeds_ada_norm": 10,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 3,
            "attention_head_dim": 64,
            "cross_attention_dim": 192,
            "caption_channels": 32,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "use_additional_conditions": True,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": TINY_LATENT,
            "pos_embed_max_size": 6,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 48,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 48,
            "guidance_embeds": True,
        },
    ),
}


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random-weight checkpoints "dit", "pixart", "sd3" and "flux".

    Read-only: a test that changes a checkpoint copies it first.
    """
    import diffusers

    folder = tmp_path_factory.mktemp("tiny")
    for name, (class_name, config) in TINY_CONFIGS.items():
        torch.manual_seed(0)
        model = getattr(diffusers, class_name)(**config)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def make_tiny_denoiser(tiny_checkpoints: Path) -> Callable[..., Denoiser]:
    """A function: family name, fields of the recipe's model section -> a new tiny denoiser."""

    def make(name: str, **section: Any) -> Denoiser:
        checkpoint = open_checkpoint(tiny_checkpoints / name)
        fields = {"checkpoint": str(checkpoint.path), "latent_size": TINY_LATENT} | section
        return make_denoiser(load_model(checkpoint), checkpoint, ModelSection(**fields))

    return make


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    """The shipped sample: checkpoint/, classifier.onnx, reference.safetensors."""
    return Path(__file__).parents[1] / "samples" / "digits"


@pytest.fixture(scope="session")
def digits_checkpoint(digits_folder: Path) -> Path:
    """The folder of the trained digits checkpoint."""
    return digits_folder / "checkpoint"


@pytest.fixture(scope="session")
def make_digits_run(
    digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function: targets -> the digits sample, W4A4 with branches, compiled for them."""

    def make(*targets: str) -> Path:
        run = tmp_path_factory.mktemp("digits") / "run"
        recipe = Recipe.model_validate(
            {
                "name": "digits",
                "model": {"checkpoint": str(digits_checkpoint)},
                "sampler": {"scheduler": "flow_match_euler", "steps": 2, "batch_size": 2},
                "search": {"rotation_group": 128, "branch": {"b_in": 2, "b_out": 2, "rank": 4}},
                "calibrate": {"num_samples": 2, "num_clip_steps": 4, "rounding": "nearest"},
                "compile": {"targets": list(targets), "max_batch": 8},
            }
        )
        with Workspace(run, recipe) as workspace:
            workspace.save()
            denoiser = workspace.denoiser
            plan = run_search(run, denoiser, workspace.checkpoint, recipe, lambda _: None)
            plan = run_calibrate(run, denoiser, plan, recipe, lambda _: None)
            tensors = load_tensors(run, plan)
            run_compile(run, denoiser, plan, tensors, recipe.compile, lambda _: None)
        return run

    return make


@dataclass(frozen=True)
class TinyRun:
    """A run folder of a tiny model, searched and calibrated. Read-only: copy it to change it."""

    run: Path
    checkpoint: Checkpoint
    denoiser: Denoiser
    recipe: Recipe
    plan: Plan
    tensors: Tensors

    def compile(self) -> CompileRecord:
        """Run the compile stage; takes seconds."""
        return run_compile(
            self.run, self.denoiser, self.plan, self.tensors, self.recipe.compile, lambda _: None
        )

    def export(self) -> ir.Model:
        """Export the quantized model, before any pass; takes seconds."""
        quantized = quantize_model(self.denoiser, self.plan, self.tensors)
        return export_graph(quantized, self.recipe.compile.max_batch)


@pytest.fixture(scope="session")
def make_tiny_recipe(tiny_checkpoints: Path) -> Callable[..., Recipe]:
    """A function: family name, fields of the search section -> a quick recipe, W4A4, rank 4."""

    def make(family: str, **search: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": f"tiny-{family}",
                "model": {
                    "checkpoint": str(tiny_checkpoints / family),
                    "latent_size": TINY_LATENT,
                },
                "sampler": {"steps": 2, "batch_size": 2},
                "search": {
                    "rotation_group": 32,
                    "branch": {"b_in": 1, "b_out": 1, "rank": 4},
                    **search,
                },
                "calibrate": {
                    "num_samples": 3,
                    "num_clip_steps": 8,
                    "max_tokens": 128,
                    "inputs": "full_precision",
                    "bias_correction": False,
                    "rounding": "nearest",
                },
            }
        )

    return make


@pytest.fixture(scope="session")
def make_tiny_run(
    make_tiny_recipe: Callable[..., Recipe],
    make_tiny_denoiser: Callable[..., Denoiser],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., TinyRun]:
    """A function: family name, fields of the search section -> a new calibrated run."""

    def make(family: str, **search: Any) -> TinyRun:
        run = tmp_path_factory.mktemp(f"run-{family}")
        recipe = make_tiny_recipe(family, **search)
        checkpoint = open_checkpoint(Path(recipe.model.checkpoint))
        denoiser = make_tiny_denoiser(family)
        plan = run_search(run, denoiser, checkpoint, recipe, lambda _: None)
        plan = run_calibrate(run, denoiser, plan, recipe, lambda _: None)
        return TinyRun(run, checkpoint, denoiser, recipe, plan, load_tensors(run, plan))

    return make


@pytest.fixture(scope="session")
def compiled_dit(make_tiny_run: Callable[..., TinyRun]) -> TinyRun:
    """The tiny DiT, W4A4 with a rank-4 branch, compiled for portable, ort and fp32."""
    tiny = make_tiny_run("dit")
    tiny.compile()
    return tiny


class HandLayer:
    """A quantized linear made by hand, with the reference's results for one input.

    Token 0 of `x` is zero and token 1 has one large value. `rank` is the number of axes of x.
    """

    def __init__(
        self,
        *,
        weight_bits: int = 4,
        act_bits: int | None = 4,
        act_scale: str = "token_rms",
        k: int = 64,
        n: int = 13,
        rotation_group: int = 32,
        group_size: int | None = None,
        bias: bool = True,
        rank: int = 3,
        name: str = "blocks.0.fc",
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.rotation_group, self.group_size = name, rotation_group, group_size
        self.weight_bits, self.rank = weight_bits, rank
        self.activation = ActivationFormat.model_validate({"bits": act_bits, "scale": act_scale})
        self.step = numerics.activation_step(self.activation)
        if act_scale == "tensor_static":
            self.step = float(np.float32(1.1 * numerics.GAUSSIAN_STEP[act_bits or 0]))
        qmin, qmax = numerics.code_range(weight_bits)
        self.codes = rng.integers(qmin, qmax + 1, (n, k)).astype(np.int8)
        num_groups = k // group_size if group_size else 1
        self.weight_scale = rng.uniform(0.01, 0.03, (n, num_groups)).astype(np.float32)
        self.bias = rng.standard_normal(n).astype(np.float32) if bias else None
        x = np.random.default_rng(1).standard_normal((6, k)).astype(np.float32)
        x[0] = 0
        x[1, 3] = 40
        self.x = x if rank == 2 else x.reshape(2, 3, k)

    @property
    def expected(self) -> NDArray[np.floating]:
        """The reference's y."""
        return numerics.qlinear(
            self.x,
            self.codes,
            self.weight_scale,
            activation=self.activation,
            step=self.step,
            rotation_group=self.rotation_group,
            bias=self.bias,
        )

    @property
    def expected_codes(self) -> NDArray[np.int8]:
        """The reference's activation codes (..., K)."""
        assert self.activation.bits is not None
        assert self.step is not None
        rotated = rotate(self.x, self.rotation_group)
        scale = numerics.activation_scale(rotated, self.activation.scale, self.step)
        return numerics.quantize_activation(rotated, scale, self.activation.bits)

    @property
    def expected_sums(self) -> NDArray[np.int32]:
        """The reference's int32 sums (..., G, N)."""
        return numerics.accumulate(self.expected_codes, self.codes, self.weight_scale.shape[1])

    def make_node(self, x: ir.Value) -> tuple[ir.Node, list[ir.Value]]:
        """Return a `treeq::QLinear` node as the exporter writes it, and its initializers."""
        arrays = {
            "planes": pack(self.codes, self.weight_bits),
            "weight_scale": self.weight_scale,
            "bias": self.bias,
        }
        values = [
            ir.val(f"model.{self.name}.{key}", const_value=ir.tensor(array))
            for key, array in arrays.items()
            if array is not None
        ]
        node = ir.node(
            "QLinear",
            [x, *values],
            attributes={
                "weight_bits": self.weight_bits,
                "act_bits": self.activation.bits or 0,
                "act_scale": self.activation.scale,
                "act_step": self.step or 0.0,
                "rotation_group": self.rotation_group,
                "group_size": self.group_size or 0,
                "in_features": self.codes.shape[1],
                "out_features": len(self.codes),
            },
            domain="treeq",
            version=1,
        )
        y = node.outputs[0]
        assert x.shape is not None
        y.name, y.type = f"{self.name}/y", ir.TensorType(ir.DataType.FLOAT)
        y.shape = ir.Shape([*x.shape[:-1], len(self.codes)])
        return node, values


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., HandLayer]:
    """A function: options of `HandLayer` -> a quantized linear made by hand."""
    return HandLayer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ir.Model]:
    """A function: hand-made layers -> a model of `treeq::QLinear` nodes that all read "x"."""

    def make(*layers: HandLayer) -> ir.Model:
        x = ir.val("x", ir.DataType.FLOAT, ["batch", *layers[0].x.shape[1:]])
        made = [layer.make_node(x) for layer in layers]
        graph = ir.Graph(
            [x],
            [node.outputs[0] for node, _ in made],
            nodes=[node for node, _ in made],
            initializers=[value for _, values in made for value in values],
            opset_imports={"": 21, "treeq": 1},
            name="hand",
        )
        return ir.Model(graph, ir_version=10)

    return make


RUN_RECIPE = """\
name: tiny
model: {checkpoint: checkpoint}
sampler: {steps: 2, batch_size: 4}
search: {rotation_group: 32, branch: {b_in: 1, b_out: 1, rank: 4}}
calibrate: {num_samples: 2, num_clip_steps: 4}
finetune:
  {mode: peft, steps: 4, batch_size: 4, num_trajectories: 4, check_every: 2, held_out_rows: 4}
compile: {targets: [ort], max_batch: 8}
validate: {batch_size: 2}
bench: {batch_sizes: [1], rounds: 3, warmup: 1, threads: 1}
evaluate: {num_samples: 2, runner: ort}
"""


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a run that takes seconds, beside its checkpoint: one DiT block. Read-only."""
    import diffusers

    folder = tmp_path_factory.mktemp("recipe")
    class_name, config = TINY_CONFIGS["dit"]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**config | {"num_layers": 1})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "checkpoint")
    (folder / "recipe.yaml").write_text(RUN_RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def finished_run(run_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of `run_recipe`. Read-only: copy it to change it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = CliRunner().invoke(main, ["run", str(run_recipe), "--out", str(run)])
    assert result.exit_code == 0, result.output
    return run


@dataclass(frozen=True)
class Outcome:
    """How a command ended; a negative status is a signal."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that an error has to be."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("treeq-export: ")]
        assert len(lines) == 1, self.stderr
        assert self.stderr.endswith(f"{lines[0]}\n")
        return lines[0]


class Driver:
    """Runs commands in processes of their own, see fork_driver.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def export(self, run: Path) -> None:
        """Export the graphs of a run once for all later commands."""
        self._order(export=str(run))

    def run(self, *args: object, trap: dict[str, Any] | None = None) -> Outcome:
        """Run `treeq-export ARGS`."""
        return Outcome(**self._order(args=[str(arg) for arg in args], trap=trap))

    def close(self) -> None:
        """End the process."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """A function-like object: command line -> how the command ended, in a process of its own."""
    driver = Driver()  # imports while the run is made
    driver.export(request.getfixturevalue("finished_run"))
    yield driver
    driver.close()
