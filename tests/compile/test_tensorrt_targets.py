"""Both TensorRT targets of whole models: what is in the file, and what ONNX Runtime makes of it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from treeq_export.compile.audits.tensorrt import INT8_GEMM, PLUGIN
from treeq_export.compile.graph.value_types import FLOATS, infer_types
from treeq_export.compile.stage import compile_target
from treeq_export.pipeline import stages
from treeq_export.recipe import CompileSection, Recipe, ValidateSection
from treeq_export.records import EMULATED
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_meta import load_compiled, read_profile
from treeq_export.targets.names import ENGINES, TENSORRT, TENSORRT_NATIVE
from treeq_export.validate.stage import run_validate

Make = Callable[..., Any]
# Each has a form that the others have not: a mask and cross-attention, blocks of a branch and
# absmax, RMS norms and rotary embeddings. DiT has 3 bits.
FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"weight_bits": 3, "activation_bits": 3},
    "pixart": {},
    "sd3": {
        "activation_scale": "token_absmax",
        "branch": {"b_in": 2, "b_out": 2, "rank": 4},
    },
    "flux": {"activation_scale": "tensor_static"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def compiled(request: pytest.FixtureRequest, make_tiny_run: Make) -> Any:
    """One family's run with both targets, and its compile records."""
    tiny = make_tiny_run(request.param, **FAMILIES[request.param])
    exported = tiny.export()
    section = CompileSection(max_batch=8, opt_batch=4)
    records = {
        target: compile_target(tiny.run, exported.clone(), target, tiny.plan, tiny.tensors, section)
        for target in ENGINES
    }
    return tiny, records


def test_every_layer_is_a_plugin_or_an_int8_gemm(compiled: Any):
    tiny, records = compiled
    for target, kind in ((TENSORRT, PLUGIN), (TENSORRT_NATIVE, INT8_GEMM)):
        audit = records[target].audit
        assert [entry.name for entry in audit] == [layer.name for layer in tiny.plan.layers]
        assert {entry.op_type for entry in audit} == {kind}
        assert all(entry.integer for entry in audit)


def test_graph_is_strongly_typed_and_half(compiled: Any):
    tiny, _ = compiled
    for target in ENGINES:
        path = tiny.run / RunFolder.graph(target)
        onnx.checker.check_model(path, full_check=True)
        model = load_compiled(tiny.run, target)
        types = infer_types(model.graph)
        for node in model.graph:
            if node.domain == "" and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                kinds = {types.get(value) for value in node.inputs if value is not None}
                assert len(kinds & FLOATS) <= 1, node.name
        assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}
        assert ir.DataType.INT64 not in {value.dtype for value in model.graph.inputs}
        body = Counter(types[n.outputs[0]] for n in model.graph if n.op_type in ("Softmax", "Gelu"))
        assert set(body) == {ir.DataType.FLOAT16}
        ops = {node.op_type for node in model.graph}
        assert "Einsum" not in ops
        assert not ops & {"MatMulInteger", "DynamicQuantizeLinear"}
        native = target == TENSORRT_NATIVE
        assert {node.domain for node in model.graph} == ({""} if native else {"", "treeq"})
        assert bool(model.functions) != native


def test_profile_and_branches(compiled: Any):
    tiny, _ = compiled
    model = load_compiled(tiny.run, TENSORRT)
    profile = read_profile(model) or {}
    assert list(profile) == [value.name for value in model.graph.inputs]
    batches = {(entry.min[0], entry.opt[0], entry.max[0]) for entry in profile.values()}
    assert batches == {(1, 4, 8)}
    layers = [node for node in model.graph if node.op_type == "QLinear"]
    assert len(layers) == len(tiny.plan.layers)
    for node in layers:
        assert len(node.inputs) == 5
        assert node.inputs[4].producer().op_type == "Monarch"


def test_parity_on_the_cpu(compiled: Any):
    """Own error is that of float16 outputs; codes and int32 sums are the reference's."""
    tiny, _ = compiled
    record = run_validate(
        tiny.run,
        tiny.denoiser,
        tiny.plan,
        tiny.tensors,
        list(ENGINES),
        ValidateSection(batch_size=3),
        seed=1,
        on_step=lambda _: None,
    )
    assert [entry.target for entry in record.targets] == list(ENGINES)
    for entry in record.targets:
        assert entry.runtime == EMULATED
        assert [gate.name for gate in entry.gates if not gate.passed] == []
        assert entry.gates[0].name == f"{entry.target} (emulated): end-to-end sqnr_db"
        assert entry.sqnr_db > 30
        assert len(entry.layers) == len(tiny.plan.layers)
        for layer in entry.layers:
            assert layer.accumulators_equal is True
            assert layer.equal_code_fraction >= 0.999
            assert layer.sqnr_db > 60
            assert layer.propagated_sqnr_db is not None


def test_second_compile_gives_the_same_bytes(compiled: Any, tmp_path: Path):
    tiny, records = compiled
    section = CompileSection(max_batch=8, opt_batch=4)
    exported = tiny.export()
    for target in ENGINES:
        again = compile_target(tmp_path, exported.clone(), target, tiny.plan, tiny.tensors, section)
        assert again == records[target]


def test_bench_leaves_them_out_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    timed: list[str] = []
    monkeypatch.setattr(
        "treeq_export.bench.stage.run_bench", lambda *_, targets, **__: timed.extend(targets)
    )
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "model": {"checkpoint": "c"},
            "compile": {"targets": ["portable", *ENGINES]},
        }
    )
    workspace: Any = SimpleNamespace(run=Path("r"), denoiser=None, recipe=recipe, say=None)
    stages._bench(workspace, lambda _: None)
    assert "portable" in timed
    assert not set(timed) & set(ENGINES)
