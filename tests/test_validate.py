"""Validate: parity that holds, tampering that is found, gates that nan does not pass."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.hand_layers import lower
from treeq_export.compile.stage import compile_target
from treeq_export.errors import OutputError, PlanError
from treeq_export.model.qlinear import QLinear
from treeq_export.model.quantized import quantize_model, quantized_layers
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.spec import WeightFormat
from treeq_export.recipe import CompileSection, ParityGates, ValidateSection
from treeq_export.records import (
    EMULATED,
    ORT_CPU,
    LayerParity,
    ParityRecord,
    TargetParity,
    load_record,
)
from treeq_export.run_folder import RunFolder
from treeq_export.runners import graph_file
from treeq_export.runners.graph_meta import load_compiled, read_layers
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.reference_trace import (
    Trace,
    find_half_overflow,
    measure_half_rounding,
    trace_reference,
)
from treeq_export.targets.names import ENGINES, TENSORRT_NATIVE
from treeq_export.validate.compare import compare_layer, reference_codes, sums_equal
from treeq_export.validate.gates import make_gates
from treeq_export.validate.stage import run_validate

Make = Callable[..., Any]
TARGETS = ["portable", "ort"]
WAYS = ["portable", "ort", "ort_body"]
TAMPERED = "transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="session")
def validated(make_tiny_run: Make, compiled_dit: Any) -> Callable[[int], tuple[Any, ParityRecord]]:
    """A function: bits -> a run of the tiny DiT with W and A of that width, and its parity."""
    done: dict[int, tuple[Any, ParityRecord]] = {}

    def get(bits: int) -> tuple[Any, ParityRecord]:
        if bits not in done:
            tiny = compiled_dit if bits == 4 else compile_bits(make_tiny_run, bits)
            before = read_graphs(tiny.run)
            done[bits] = tiny, validate(tiny, tiny.run, TARGETS)
            assert read_graphs(tiny.run) == before
        return done[bits]

    return get


def compile_bits(make_tiny_run: Make, bits: int) -> Any:
    tiny = make_tiny_run("dit", weight_bits=bits, activation_bits=bits)
    exported = tiny.export()
    for target in TARGETS:
        compile_target(
            tiny.run, exported.clone(), target, tiny.plan, tiny.tensors, CompileSection()
        )
    return tiny


def read_graphs(run: Path) -> dict[str, bytes]:
    return {target: (run / RunFolder.graph(target)).read_bytes() for target in TARGETS}


def validate(tiny: Any, run: Path, targets: list[str], **section: Any) -> ParityRecord:
    return run_validate(
        run,
        tiny.denoiser,
        tiny.plan,
        tiny.tensors,
        targets,
        ValidateSection(batch_size=3, **section),
        seed=5,
        on_step=lambda _: None,
    )


@pytest.mark.parametrize(
    "bits", [4, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_parity_holds_for_every_layer(bits: int, validated: Make):
    tiny, record = validated(bits)
    assert [entry.target for entry in record.targets] == WAYS
    for entry in record.targets:
        assert entry.passed
        assert len(entry.gates) == 4
        assert all(gate.passed for gate in entry.gates)
        assert entry.sqnr_db > 40
        assert [layer.name for layer in entry.layers] == [layer.name for layer in tiny.plan.layers]
        for layer in entry.layers:
            assert layer.equal_code_fraction is not None
            assert layer.equal_code_fraction >= 0.999
            assert layer.accumulators_equal is True
            assert layer.sqnr_db > 60
            inside = layer.propagated_sqnr_db
            # None where the value is inside a fused node: the MLP's and the gated outputs.
            assert (inside is None) == (entry.target != "portable" and is_fused_away(layer.name))
            assert inside is None or inside > 40
            # The quantization itself costs far more than the runtime does.
            assert layer.quantization_sqnr_db < 50 < layer.sqnr_db
    assert load_record(tiny.run / "parity.json", ParityRecord, "validate") == record


@pytest.mark.slow
def test_more_bits_quantize_better(validated: Make):
    least = []
    for bits in (3, 4, 8):
        entry = validated(bits)[1].targets[1]
        least.append(min(layer.quantization_sqnr_db for layer in entry.layers))
    assert least == sorted(least)
    assert least[2] > least[0] + 15


def test_steps_and_seed(compiled_dit: Any):
    steps: list[float] = []
    record = run_validate(
        compiled_dit.run,
        compiled_dit.denoiser,
        compiled_dit.plan,
        compiled_dit.tensors,
        ["ort"],
        ValidateSection(batch_size=2),
        seed=11,
        on_step=steps.append,
    )
    assert steps == sorted(set(steps))
    assert steps[-1] == 1.0
    assert len(steps) == 2 * len(compiled_dit.plan.layers)
    assert (record.batch_size, record.seed) == (2, 11)


def tamper(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one initializer of a compiled graph."""
    model = ir.serde.deserialize_model(onnx.load(path))
    value = model.graph.initializers[name]
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = change(before.copy())
    assert after.dtype == before.dtype
    value.const_value = ir.tensor(after, name=name)
    ir.save(model, path)


def negate_codes(array: Any) -> Any:
    """Change one output channel: the INT4 codes of column 0, or the packed bits of row 0."""
    if array.ndim == 3:
        array[:, 0, :] = ~array[:, 0, :]
    else:
        array[:, 0] = (-1 - array[:, 0].astype(np.int8)).astype(array.dtype)
    return array


TENSORS = {
    ("portable", "code"): f"{TAMPERED}.weight_quantized",
    ("portable", "scale"): f"{TAMPERED}.weight_quantized_scale",
    ("ort", "code"): f"model.{TAMPERED}.planes",
    ("ort", "scale"): f"model.{TAMPERED}.weight_scale",
}


def validate_tampered(
    tiny: Any, run: Path, way: str, tensor: str, change: Callable[[Any], Any]
) -> TargetParity:
    target = way.removesuffix("_body")
    shutil.copytree(tiny.run / "onnx" / target, run / "onnx" / target)
    tamper(run / RunFolder.graph(target), tensor, change)
    [entry] = [entry for entry in validate(tiny, run, [target]).targets if entry.target == way]
    return entry


@pytest.mark.parametrize("kind", ["code", "scale"])
@pytest.mark.parametrize("target", WAYS)
def test_tampering_is_found_where_it_is(target: str, kind: str, compiled_dit: Any, tmp_path: Path):
    change = negate_codes if kind == "code" else lambda scale: scale * np.float32(1.03)
    tensor = TENSORS[target.removesuffix("_body"), kind]
    entry = validate_tampered(compiled_dit, tmp_path, target, tensor, change)
    assert not entry.passed
    failed = [gate.name for gate in entry.gates if not gate.passed]
    assert f"{target}: own sqnr_db of the worst layer ({TAMPERED})" in failed
    named = f"{target}: layers with equal int32 sums (not {TAMPERED})"
    assert (named in failed) == (kind == "code")
    names = [layer.name for layer in entry.layers]
    position = names.index(TAMPERED)
    assert 0 < position < len(names) - 1
    for index, layer in enumerate(entry.layers):
        assert (layer.sqnr_db < 40) == (index == position)
        assert layer.accumulators_equal is not (kind == "code" and index == position)
        assert layer.equal_code_fraction is not None
        assert layer.equal_code_fraction >= 0.999
        # Errors travel forward only.
        inside = layer.propagated_sqnr_db
        unharmed = index < position or is_conditioning(layer.name)
        assert inside is None or (inside > 100) == unharmed


def is_fused_away(name: str) -> bool:
    """Whether a layer's output is followed by GELU, or by a gate and the residual."""
    return any(part in name for part in (".ff.net.", ".to_out."))


def is_conditioning(name: str) -> bool:
    """Whether a layer reads timestep and class alone."""
    return ".norm1.linear" in name


@pytest.mark.slow
@pytest.mark.parametrize("external", [False, True])
def test_large_graphs_go_through_files_with_equal_results(
    external: bool, compiled_dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    shutil.copytree(compiled_dit.run, run)
    small = validate(compiled_dit, run, TARGETS)
    if external:
        for target in TARGETS:
            path = run / RunFolder.graph(target)
            model = ir.load(path)
            ir.external_data.load_to_model(model)
            ir.save(model, path, external_data="model.onnx.data")
    before = sorted(path.name for path in run.rglob("*"))
    monkeypatch.setattr(graph_file, "IN_MEMORY_BYTES", 0)
    opened: list[Any] = []
    entered = OrtRunner.__enter__

    def enter(runner: OrtRunner) -> OrtRunner:
        opened.append(runner.model)
        return entered(runner)

    monkeypatch.setattr(OrtRunner, "__enter__", enter)
    large = validate(compiled_dit, run, TARGETS)
    assert large == small
    written = [path for path in opened if isinstance(path, Path) and ".partial" in str(path)]
    assert len(written) == len(WAYS)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_full_disk_is_one_line(
    compiled_dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = load_compiled(compiled_dit.run, "portable")
    monkeypatch.setattr(graph_file, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(ir, "save", refuse)
    stack = ExitStack()
    with pytest.raises(OutputError, match=r"GB of weights can be written \(No space left"), stack:
        stack.enter_context(graph_file.runnable(model, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["ort", "ort_body"])
def test_one_code_is_enough(way: str, compiled_dit: Any, tmp_path: Path):
    """One weight moved by one step: too little for the sqnr gate, not for the exact sums."""

    def flip_lowest_bit(planes: Any) -> Any:
        planes[0, 5, 1] ^= 1 << 7
        return planes

    entry = validate_tampered(compiled_dit, tmp_path, way, TENSORS["ort", "code"], flip_lowest_bit)
    assert not entry.passed
    failed = [gate.name for gate in entry.gates if not gate.passed]
    assert f"{way}: layers with equal int32 sums (not {TAMPERED})" in failed
    assert [layer.name for layer in entry.layers if not layer.accumulators_equal] == [TAMPERED]


def test_nan_in_a_graph_fails(compiled_dit: Any, tmp_path: Path):
    def put_nan(scale: Any) -> Any:
        scale.reshape(-1)[2] = np.nan
        return scale

    entry = validate_tampered(compiled_dit, tmp_path, "ort", TENSORS["ort", "scale"], put_nan)
    assert not entry.passed
    assert math.isnan(entry.sqnr_db)
    failed = [gate.name for gate in entry.gates if not gate.passed]
    assert failed[:2] == [
        "ort: end-to-end sqnr_db",
        f"ort: own sqnr_db of the worst layer ({TAMPERED})",
    ]
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written["targets"][0]["sqnr_db"] == "NaN"


def make_parity(name: str, **fields: Any) -> LayerParity:
    values = {
        "sqnr_db": 90.0,
        "max_abs_error": 0.0,
        "equal_code_fraction": 1.0,
        "accumulators_equal": True,
        "propagated_sqnr_db": 80.0,
        "quantization_sqnr_db": 20.0,
    }
    return LayerParity(name=name, **values | fields)


def failed_gates(sqnr: float, layers: list[LayerParity]) -> list[str]:
    gates = make_gates("ort", sqnr, layers, ParityGates())
    return [gate.name for gate in gates if not gate.passed]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("field", ["sqnr_db", "equal_code_fraction"])
def test_nan_passes_no_gate(field: str, position: int):
    layers = [make_parity(name) for name in "abc"]
    layers[position] = make_parity("bad", **{field: math.nan})
    [failed] = failed_gates(90.0, layers)
    assert "(bad)" in failed


def test_nan_end_to_end_passes_no_gate():
    layers = [make_parity("a")]
    assert failed_gates(math.nan, layers) == ["ort: end-to-end sqnr_db"]
    assert failed_gates(math.inf, layers) == []


def test_gates_name_the_worst_layer():
    layers = [
        make_parity("a", sqnr_db=39.0, equal_code_fraction=0.9985),
        make_parity("b", sqnr_db=38.0),
        make_parity("c", equal_code_fraction=0.99, accumulators_equal=False),
        make_parity("d", accumulators_equal=None),
    ]
    assert failed_gates(39.9, layers) == [
        "ort: end-to-end sqnr_db",
        "ort: own sqnr_db of the worst layer (b)",
        "ort: equal codes of the worst layer (c)",
        "ort: layers with equal int32 sums (not c)",
    ]
    gates = make_gates("ort", 39.9, layers, ParityGates())
    assert [gate.measured for gate in gates] == [39.9, 38.0, 0.99, 2]
    assert [gate.limit for gate in gates] == [40.0, 40.0, 0.999, 4]


def test_limits_are_the_recipe_s():
    layers = [make_parity("a", sqnr_db=39.0, equal_code_fraction=0.9)]
    limits = ParityGates(
        min_end_to_end_sqnr_db=10, min_equal_code_fraction=0.9, min_layer_sqnr_db=39
    )
    assert all(gate.passed for gate in make_gates("ort", 10.0, layers, limits))


def test_weight_only_layers_have_no_code_gates():
    layers = [make_parity("a", equal_code_fraction=None, accumulators_equal=None)]
    gates = make_gates("ort", 90.0, layers, ParityGates())
    assert [gate.name for gate in gates] == [
        "ort: end-to-end sqnr_db",
        "ort: own sqnr_db of the worst layer (a)",
    ]


def test_gates_do_not_stop_the_record(compiled_dit: Any, tmp_path: Path):
    shutil.copytree(compiled_dit.run / "onnx" / "ort", tmp_path / "onnx" / "ort")
    limits = ParityGates(min_end_to_end_sqnr_db=1000)
    entries = validate(compiled_dit, tmp_path, ["ort"], gates=limits).targets
    assert len(entries) == 2
    for entry in entries:
        assert not entry.passed
        assert [gate.passed for gate in entry.gates] == [False, True, True, True]
    saved = load_record(tmp_path / "parity.json", ParityRecord, "validate")
    assert saved.targets == entries


def test_plan_of_other_layers_is_an_error(compiled_dit: Any):
    layers = compiled_dit.plan.layers[1:]
    plan = compiled_dit.plan.model_copy(update={"layers": layers})
    with pytest.raises(PlanError, match=r"holds 14 layers, the plan 13\. Run `treeq-export comp"):
        run_validate(
            compiled_dit.run,
            compiled_dit.denoiser,
            plan,
            compiled_dit.tensors,
            ["portable"],
            ValidateSection(),
            0,
            lambda _: None,
        )


def test_missing_target_is_an_error(compiled_dit: Any, tmp_path: Path):
    with pytest.raises(PlanError, match=r"portable/model\.onnx: missing"):
        validate(compiled_dit, tmp_path, ["portable"])
    assert not (tmp_path / "parity.json").exists()


def test_trace_holds_what_the_reference_computed(compiled_dit: Any):
    quantized = quantize_model(compiled_dit.denoiser, compiled_dit.plan, compiled_dit.tensors)
    inputs = quantized.make_example_inputs(2, seed=3)
    trace = trace_reference(quantized, inputs)
    with torch.no_grad():
        expected = quantized(*inputs.values()).numpy()
    np.testing.assert_array_equal(trace.output, expected)
    names = [layer.name for layer in compiled_dit.plan.layers]
    assert sorted(trace.layer_inputs) == sorted(trace.layer_outputs) == sorted(names)
    for name, layer in quantized_layers(quantized).items():
        with torch.no_grad():
            output = layer(torch.from_numpy(trace.layer_inputs[name])).numpy()
        np.testing.assert_array_equal(trace.layer_outputs[name], output)
        assert not layer._forward_hooks


@pytest.fixture
def make_reference() -> Callable[[Any], QLinear]:
    """A function: a hand-made layer -> the same as a module."""

    def make(layer: Any) -> QLinear:
        n, k = layer.codes.shape
        tensors = {"codes": layer.codes, "weight_scale": layer.weight_scale}
        if layer.step is not None:
            tensors["activation_step"] = np.array([layer.step], np.float32)
        entry = LayerPlan(
            name=layer.name,
            in_features=k,
            out_features=n,
            tree=TreePath(block=0, position="fc", leaf=0),
            weight=WeightFormat(bits=layer.weight_bits, group_size=layer.group_size),
            activation=layer.activation,
            rotation_group=layer.rotation_group,
        )
        return QLinear(entry, tensors, torch.from_numpy(layer.bias))

    return make


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options",
    [{"act_bits": None, "act_scale": "none"}, {"group_size": 16}, {"act_scale": "tensor_static"}],
)
def test_single_layers_of_every_kind(
    options: dict[str, Any], target: str, make_layer: Make, make_model: Make, make_reference: Make
):
    hand = make_layer(**options)
    reference = make_reference(hand)
    model = lower(make_model(hand), target)
    full = torch.nn.Linear(64, 13)
    trace = Trace({}, np.zeros(1), {hand.name: hand.x}, {hand.name: hand.expected})
    probe = LayerProbe(model, read_layers(model)[0])
    parity = compare_layer(probe, reference, full, trace, propagated=hand.expected * 1.1)
    assert parity.name == hand.name
    assert parity.sqnr_db > 100
    assert parity.max_abs_error < 1e-4
    assert parity.propagated_sqnr_db == pytest.approx(20, abs=0.01)
    assert parity.quantization_sqnr_db < 10
    weight_only = hand.activation.bits is None
    assert parity.equal_code_fraction == (None if weight_only else 1.0)
    assert parity.accumulators_equal == (None if weight_only else True)


def test_reference_codes_are_those_of_numerics(make_layer: Make, make_reference: Make):
    hand = make_layer(act_bits=3)
    np.testing.assert_array_equal(
        reference_codes(make_reference(hand), hand.x), hand.expected_codes
    )
    weight_only = make_layer(act_bits=None, act_scale="none")
    assert reference_codes(make_reference(weight_only), hand.x) is None


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_sums_have_to_be_equal_to_the_last_bit(
    group_size: int | None, dtype: Any, make_layer: Make, make_reference: Make
):
    hand = make_layer(group_size=group_size)
    reference, codes = make_reference(hand), hand.expected_codes
    sums = hand.expected_sums.astype(dtype)
    assert sums_equal(reference, codes, sums)
    off = sums.copy()
    off[1, 2, 0, 3] += 1
    assert not sums_equal(reference, codes, off)
    assert not sums_equal(reference, codes, sums[..., :-1])


@pytest.fixture(scope="module")
def tensorrt_dit(
    compiled_dit: Any, exported_dit_for_validate: ir.Model, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The compiled tiny DiT with graphs of TensorRT's targets in a folder of their own."""
    run = tmp_path_factory.mktemp("tensorrt")
    for target in ENGINES:
        graph = exported_dit_for_validate.clone()
        section = compiled_dit.recipe.compile
        compile_target(run, graph, target, compiled_dit.plan, compiled_dit.tensors, section)
    return dataclasses.replace(compiled_dit, run=run)


@pytest.fixture(scope="module")
def exported_dit_for_validate(compiled_dit: Any) -> ir.Model:
    """An export of the compiled tiny DiT, before any pass. Read-only."""
    return compiled_dit.export()


def test_tensorrt_targets_say_that_they_are_emulated(tensorrt_dit: Any, tmp_path: Path):
    shutil.copytree(tensorrt_dit.run / "onnx", tmp_path / "onnx")
    record = validate(tensorrt_dit, tmp_path, list(ENGINES))
    for entry, target in zip(record.targets, ENGINES, strict=True):
        assert (entry.target, entry.runtime) == (target, EMULATED)
        assert entry.passed
        assert all(gate.name.startswith(f"{target} (emulated): ") for gate in entry.gates)
        # W4A4: float16 alone takes the reference to about 40 dB.
        assert 25 < entry.gates[0].limit <= ParityGates().min_end_to_end_sqnr_db
        assert min(layer.sqnr_db for layer in entry.layers) > 60
        assert all(layer.accumulators_equal for layer in entry.layers)
        # The rounding of activations inside the network is not in the own error.
        for layer in entry.layers:
            assert layer.propagated_sqnr_db is not None
            assert layer.propagated_sqnr_db < layer.sqnr_db
    assert load_record(tmp_path / "parity.json", ParityRecord, "validate") == record


@pytest.mark.parametrize("kind", ["code", "scale"])
@pytest.mark.parametrize("target", ENGINES)
def test_tampering_is_found_in_tensorrt_targets(
    target: str, kind: str, tensorrt_dit: Any, tmp_path: Path
):
    change = negate_codes if kind == "code" else lambda scale: scale * np.float32(1.03)
    like = "portable" if target == TENSORRT_NATIVE else "ort"
    entry = validate_tampered(tensorrt_dit, tmp_path, target, TENSORS[like, kind], change)
    assert not entry.passed
    failed = [gate.name for gate in entry.gates if not gate.passed]
    assert f"{target} (emulated): own sqnr_db of the worst layer ({TAMPERED})" in failed
    named = f"{target} (emulated): layers with equal int32 sums (not {TAMPERED})"
    assert (named in failed) == (kind == "code")
    assert [layer.name for layer in entry.layers if layer.sqnr_db < 40] == [TAMPERED]


def test_other_runtimes_are_named(compiled_dit: Any, tmp_path: Path):
    shutil.copytree(compiled_dit.run / "onnx" / "portable", tmp_path / "onnx" / "portable")
    [entry] = validate(compiled_dit, tmp_path, ["portable"]).targets
    assert entry.runtime == ORT_CPU
    assert entry.gates[0].limit == ParityGates().min_end_to_end_sqnr_db


def test_half_bodies_are_held_to_the_rounded_reference(compiled_dit: Any):
    quantized = quantize_model(compiled_dit.denoiser, compiled_dit.plan, compiled_dit.tensors)
    trace = trace_reference(quantized, quantized.make_example_inputs(2, seed=3))
    rounding = measure_half_rounding(quantized, trace)
    assert 25 < rounding < 80
    assert not any(module._forward_hooks for module in quantized.modules())
    layers = [make_parity("a")]

    def gate(half_rounding_db: float | None) -> float:
        return make_gates("t", 90.0, layers, ParityGates(), half_rounding_db)[0].limit

    assert gate(None) == 40.0
    assert gate(30.5) == 24.5
    assert gate(60.0) == gate(math.inf) == gate(math.nan) == 40.0


def test_an_overflow_of_float16_is_named_with_what_helps(compiled_dit: Any):
    quantized = quantize_model(compiled_dit.denoiser, compiled_dit.plan, compiled_dit.tensors)
    inputs = compiled_dit.denoiser.make_example_inputs(1, seed=0)
    trace = trace_reference(quantized, inputs)
    assert find_half_overflow(quantized, trace) is None
    block = quantized.model.get_submodule("transformer_blocks.1.ff.net.2")
    handle = block.register_forward_hook(lambda _module, _inputs, output: 1e6 * output)
    large = trace_reference(quantized, inputs)
    assert np.isfinite(large.output).all()
    assert not math.isfinite(measure_half_rounding(quantized, large))
    found = find_half_overflow(quantized, large)
    handle.remove()
    assert found == "transformer_blocks.1.ff.net.2"
    layers = [make_parity("a")]
    gate = make_gates("t (emulated)", math.nan, layers, ParityGates(), math.nan, found)[0]
    assert not gate.passed
    assert gate.name == (
        "t (emulated): end-to-end sqnr_db (float16 overflows from transformer_blocks.1.ff.net.2 "
        "on; use target ort or portable)"
    )
