"""PixArt, SD3 and Flux through search, calibrate, compile and validate; other tests have DiT."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from treeq_export.compile.audits.onnx_runtime import INTEGER_OPS
from treeq_export.model.layers import discover_linears
from treeq_export.plan import load_plan, load_tensors
from treeq_export.recipe import ValidateSection
from treeq_export.records import CompileRecord, load_record
from treeq_export.runners.graph_meta import load_compiled, read_layers
from treeq_export.validate.stage import run_validate

# All are W4A4 with a rank-4 branch; each also has one form that the others have not.
SEARCH: dict[str, dict[str, Any]] = {
    "pixart": {"group_size": 32},
    "sd3": {
        "activation_scale": "token_absmax",
        "branch": {"b_in": 2, "b_out": 2, "rank": 4},
    },
    "flux": {"activation_scale": "tensor_static"},
}
TARGETS = ["portable", "ort"]


@pytest.fixture(scope="session", params=SEARCH)
def compiled_family(request: pytest.FixtureRequest, make_tiny_run: Callable[..., Any]) -> Any:
    """One family's run, compiled for both targets and fp32."""
    tiny = make_tiny_run(request.param, **SEARCH[request.param])
    tiny.compile()
    return tiny


def test_every_linear_of_the_blocks_is_quantized(compiled_family: Any):
    linears = discover_linears(compiled_family.denoiser)
    assert len(linears) >= 20
    plan = load_plan(compiled_family.run, compiled_family.checkpoint.sha256)
    assert [layer.name for layer in plan.layers] == [linear.name for linear in linears]
    assert len({layer.name for layer in plan.layers}) == len(plan.layers)
    tensors = load_tensors(compiled_family.run, plan)
    for layer, linear in zip(plan.layers, linears, strict=True):
        assert tensors[f"{layer.name}.codes"].shape == (linear.out_features, linear.in_features)
        assert layer.branch is not None
        assert layer.branch.rank == 4
        assert (layer.weight.bits, layer.activation.bits) == (4, 4)
    for target in TARGETS:
        sites = read_layers(load_compiled(compiled_family.run, target))
        assert sorted(site.name for site in sites) == sorted(linear.name for linear in linears)


def test_audit_finds_integers_only(compiled_family: Any):
    record = load_record(compiled_family.run / "compile.json", CompileRecord, "compile")
    assert [entry.target for entry in record.targets] == [*TARGETS, "fp32"]
    num_layers = len(discover_linears(compiled_family.denoiser))
    for entry in record.targets[:2]:
        assert len(entry.audit) == num_layers
        packed = {"treeq::QLinear", "treeq::FusedQLinear"}
        kernels = packed if entry.target == "ort" else INTEGER_OPS
        assert {layer.op_type for layer in entry.audit} <= kernels
        assert all(layer.integer for layer in entry.audit)


@pytest.mark.slow
def test_parity_gates_pass(compiled_family: Any):
    record = run_validate(
        compiled_family.run,
        compiled_family.denoiser,
        compiled_family.plan,
        compiled_family.tensors,
        TARGETS,
        ValidateSection(batch_size=3),
        seed=1,
        on_step=lambda _: None,
    )
    for entry in record.targets:
        assert [gate.name for gate in entry.gates if not gate.passed] == []
        assert entry.passed
        assert len(entry.layers) == len(compiled_family.plan.layers)
        for layer in entry.layers:
            assert layer.accumulators_equal is True
            assert layer.quantization_sqnr_db > 5


def test_inputs_are_the_denoiser_s(compiled_family: Any):
    for target in (*TARGETS, "fp32"):
        graph = load_compiled(compiled_family.run, target).graph
        names = [value.name for value in graph.inputs]
        assert names == list(compiled_family.denoiser.input_names)
        assert not [node for node in graph if is_illegal_squeeze(node)]


def is_illegal_squeeze(node: ir.Node) -> bool:
    if node.op_type != "Squeeze" or len(node.inputs) < 2:
        return False
    shape, axes = node.inputs[0].shape, ir.convenience.get_const_tensor(node.inputs[1])
    return shape is not None and axes is not None and any(shape[a] != 1 for a in axes.numpy())
