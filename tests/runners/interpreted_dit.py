"""A tiny DiT in the Triton kernels, in the interpreter, against the reference; prints JSON.

Run in a process of its own with TRITON_INTERPRET=1: it has to be set before treeq_gpu is imported.
Its blocks' linears have every kind of format that the kernels know.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from treeq_export.bisect.cuda import CUDA, compare_cuda
from treeq_export.model.families.dit import LABELS, DiTDenoiser
from treeq_export.model.layers import discover_linears
from treeq_export.model.quantized import linear_of, quantize_model, quantized_layers
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    Tensors,
    TreePath,
)
from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import ParityGates
from treeq_export.runners.cuda_runner import CudaRunner
from treeq_export.runners.gpu_layers import GpuQLinear
from treeq_export.runners.gpu_ops import load_launch
from treeq_export.runners.reference_trace import Reference, trace_reference
from treeq_export.runners.ways import Way
from treeq_export.validate.gates import judge

# Weight bits, group, activation bits, scale, rotation, branch (b_in, b_out, rank).
FORMATS: list[tuple[Any, ...]] = [
    (3, None, 3, "token_rms", 64, (1, 1, 4)),
    (4, 32, 4, "token_rms", 32, None),
    (2, None, 4, "tensor_static", 1, (2, 2, 3)),
    (8, None, 8, "token_absmax", 64, None),
    (4, None, None, "none", 64, (1, 1, 4)),
]
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 10,
}


def make_denoiser() -> DiTDenoiser:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**CONFIG)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return DiTDenoiser(model, (4, 4, 4), LABELS).eval()


def make_plan(denoiser: Denoiser) -> tuple[Plan, Tensors]:
    """q, k and v share one format; the other layers take turns."""
    rng = np.random.default_rng(0)
    layers: list[LayerPlan] = []
    tensors: Tensors = {}
    others = itertools.cycle(FORMATS[1:])
    for info in discover_linears(denoiser):
        sibling = ".attn1.to_" in info.name and "to_out" not in info.name
        bits, group, act_bits, scale, rotation, branch = FORMATS[0] if sibling else next(others)
        layer = LayerPlan(
            name=info.name,
            in_features=info.in_features,
            out_features=info.out_features,
            tree=TreePath(block=info.block, position=info.position, leaf=info.leaf),
            weight=WeightFormat(bits=bits, group_size=group),
            activation=ActivationFormat(bits=act_bits, scale=scale),
            rotation_group=rotation,
            branch=None if branch is None else BranchFormat(**dict(zip(KEYS, branch, strict=True))),
        )
        layers.append(layer)
        tensors |= make_tensors(denoiser, layer, rng)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=ModelRecord(name="tiny", class_name="DiTTransformer2DModel", num_parameters=0),
        checkpoint_sha256="0",
        strategy=StrategyRecord(name="hand", options={}),
        layers=tuple(layers),
    )
    return plan, tensors


KEYS = ("b_in", "b_out", "rank")


def make_tensors(denoiser: Denoiser, layer: LayerPlan, rng: np.random.Generator) -> Tensors:
    weight = linear_of(denoiser, layer).weight.detach().numpy()
    rotated = rotate(weight, layer.rotation_group)
    groups = layer.in_features // (layer.weight.group_size or layer.in_features)
    grouped = np.abs(rotated.reshape(len(rotated), groups, -1))
    scale = (grouped.max(axis=2) / max(INTEGER.ends(layer.weight.bits)[1], 1)).astype("f4")
    tensors = {
        "codes": numerics.quantize_weight(rotated, scale, layer.weight.bits),
        "weight_scale": scale,
    }
    if layer.activation.bits is not None:
        step = numerics.activation_step(layer.activation) or 0.4
        tensors["activation_step"] = np.array([step], np.float32)
    if layer.branch is not None:
        b_in, b_out, rank = layer.branch.b_in, layer.branch.b_out, layer.branch.rank
        shapes = {
            "branch.R": (b_in, layer.in_features // b_in, b_out * rank),
            "branch.L": (b_out, b_in * rank, layer.out_features // b_out),
        }
        for name, shape in shapes.items():
            tensors[name] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return {f"{layer.name}.{name}": array for name, array in tensors.items()}


def count_quantizations(run: Callable[[], object]) -> int:
    """Return how often `run` quantizes tokens."""
    launch = load_launch()
    quantize, calls = launch.quantize_tokens, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return quantize(*args, **options)

    launch.quantize_tokens = counted
    run()
    launch.quantize_tokens = quantize
    return calls


def compile_block(runner: CudaRunner, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return what torch.compile changes, and how often it quantizes; a graph break is an error."""
    tensors = runner.prepare(inputs)
    block = runner.model.model.transformer_blocks[0]
    plain = runner.model(*tensors)
    block.compile(fullgraph=True, backend="aot_eager")
    difference = float((runner.model(*tensors) - plain).abs().max())
    return {
        "difference": difference,
        "num_quantizations": count_quantizations(lambda: runner.run(inputs)),
    }


def main() -> None:
    torch.set_num_threads(1)
    denoiser = make_denoiser()
    plan, tensors = make_plan(denoiser)
    quantized = quantize_model(denoiser, plan, tensors)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    trace = trace_reference(quantized, denoiser.make_example_inputs(2, 3))
    reference = Reference(denoiser, quantized, plan, trace)
    results: dict[str, Any] = {"layers": [layer.name for layer in plan.layers]}
    for dtype in sys.argv[1:]:
        captured: list[Any] = []

        def capture(call: Any, captured: list[Any] = captured) -> Any:
            captured.append(call)
            return call

        with CudaRunner(quantized, dtype=dtype, device="cpu", capture=capture) as runner:
            output = runner.run(trace.inputs)
            layers = list(compare_cuda(runner, reference))
            parity = judge(reference, Way(CUDA, CUDA), output, layers, ParityGates())
            first = runner.run(trace.inputs)
            num = count_quantizations(lambda runner=runner: runner.run(trace.inputs))
            kernels = [m for m in runner.model.modules() if isinstance(m, GpuQLinear)]
            results[dtype] = json.loads(parity.model_dump_json()) | {
                "repeatable": bool(np.array_equal(first, runner.run(trace.inputs))),
                "num_captures": len(captured),
                "num_quantizations": num,
                "num_kernel_layers": len(kernels),
                "types": sorted({str(m.weight_scale.dtype) for m in kernels}),
                "compiled": compile_block(runner, trace.inputs),
                "body": str(next(runner.model.model.proj_out_2.parameters()).dtype),
            }
    after = quantized.state_dict()
    results["reference_untouched"] = all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    results["num_references"] = len(quantized_layers(quantized))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
