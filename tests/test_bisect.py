"""Bisect: a layer that was broken on purpose is the one that is named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from tests.hand_layers import lower
from treeq_export.artefacts import sha256_of_file
from treeq_export.bisect.departure import find_departure, layers_before
from treeq_export.bisect.network import bisect_network, cut_prefix, run_as_engine
from treeq_export.bisect.run import run_bisect
from treeq_export.cli import main
from treeq_export.errors import PlanError, RunnerError
from treeq_export.model.quantized import quantize_model
from treeq_export.recipe import ValidateSection
from treeq_export.records import save_record
from treeq_export.records.build import EngineManifest, ShapeRange, VerifierSummary
from treeq_export.run_folder import RunFolder
from treeq_export.runners.graph_meta import LayerSite, load_compiled, read_layers
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.reference_trace import trace_reference
from treeq_export.runners.tensorrt_library import load_runtime

Make = Callable[..., Any]
WAYS = ["portable", "ort", "ort_body"]
BROKEN = "transformer_blocks.0.ff.net.0.proj"
SCALE = {"portable": f"{BROKEN}.weight_quantized_scale", "ort": f"model.{BROKEN}.weight_scale"}


def break_layer(run: Path, target: str, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one initializer of a compiled graph."""
    path = run / RunFolder.graph(target.removesuffix("_body"))
    model = ir.serde.deserialize_model(onnx.load(path))
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=name)
    ir.save(model, path)


def grow(scale: Any) -> Any:
    return scale * np.float32(1.05)


@pytest.fixture
def copy_target(compiled_dit: Any, tmp_path: Path) -> Callable[[str], Path]:
    def copy(way: str) -> Path:
        target = way.removesuffix("_body")
        shutil.copytree(compiled_dit.run / "onnx" / target, tmp_path / "onnx" / target)
        return tmp_path

    return copy


def bisect(tiny: Any, run: Path, way: str, **options: Any) -> Any:
    return run_bisect(
        run,
        tiny.denoiser,
        tiny.plan,
        tiny.tensors,
        way,
        ValidateSection(batch_size=2),
        seed=3,
        on_step=options.pop("on_step", lambda _: None),
        **options,
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_graph_has_no_fault(way: str, compiled_dit: Any):
    steps: list[float] = []
    record = bisect(compiled_dit, compiled_dit.run, way, on_step=steps.append)
    num = len(compiled_dit.plan.layers)
    assert record.layer is None
    assert record.departed is None
    assert (record.num_examined, record.num_layers) == (num, num)
    assert record.sentence() == f"{way}: all {num} layers are within bounds."
    assert steps[-1] == 1.0
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_scale_is_found_where_it_is(way: str, compiled_dit: Any, copy_target: Make):
    run = copy_target(way)
    break_layer(run, way, SCALE[way.removesuffix("_body")], grow)
    record = bisect(compiled_dit, run, way)
    assert record.layer == BROKEN
    assert record.parity.name == BROKEN
    assert [reason[:8] for reason in record.reasons] == ["own sqnr"]
    names = [layer.name for layer in compiled_dit.plan.layers]
    assert record.num_examined == names.index(BROKEN) + 1
    assert record.departed == (BROKEN if way == "portable" else None)
    assert f"{way}: {BROKEN} is the first layer out of bounds" in record.sentence()


def test_one_wrong_code_is_found_by_the_sums(compiled_dit: Any, copy_target: Make):
    def flip_lowest_bit(planes: Any) -> Any:
        planes[0, 5, 1] ^= 1 << 7
        return planes

    run = copy_target("ort")
    break_layer(run, "ort", f"model.{BROKEN}.planes", flip_lowest_bit)
    record = bisect(compiled_dit, run, "ort", min_sqnr_db=-100.0)
    assert record.layer == BROKEN
    assert record.reasons == ["int32 sums differ for equal codes"]


def test_the_first_of_two_is_named(compiled_dit: Any, copy_target: Make):
    names = [layer.name for layer in compiled_dit.plan.layers]
    run = copy_target("portable")
    for name in (names[-1], BROKEN):
        break_layer(run, "portable", f"{name}.weight_quantized_scale", grow)
    assert bisect(compiled_dit, run, "portable").layer == BROKEN


def test_nan_is_out_of_bounds(compiled_dit: Any, copy_target: Make):
    def put_nan(scale: Any) -> Any:
        scale.reshape(-1)[2] = np.nan
        return scale

    run = copy_target("ort")
    break_layer(run, "ort", SCALE["ort"], put_nan)
    record = bisect(compiled_dit, run, "ort")
    assert (record.layer, record.reasons) == (BROKEN, ["own sqnr nan dB < 40 dB"])


def test_the_threshold_decides(compiled_dit: Any):
    record = bisect(compiled_dit, compiled_dit.run, "portable", min_sqnr_db=1000.0)
    assert record.layer == compiled_dit.plan.layers[0].name
    assert record.reasons[0].endswith("dB < 1000 dB")
    assert record.min_sqnr_db == 1000.0


def test_a_graph_of_other_layers_is_an_error(compiled_dit: Any):
    plan = compiled_dit.plan.model_copy(update={"layers": compiled_dit.plan.layers[1:]})
    with pytest.raises(PlanError, match=r"holds 14 layers, the plan 13\. Run `treeq-export comp"):
        run_bisect(
            compiled_dit.run,
            compiled_dit.denoiser,
            plan,
            compiled_dit.tensors,
            "ort",
            ValidateSection(),
            0,
            lambda _: None,
        )


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(main, ["bisect", *arguments])

    @pytest.fixture
    def run_folder(self, finished_run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(finished_run, tmp_path / "run"))

    def test_sound(self, finished_run: Path):
        result = self.run("--run", str(finished_run), "--target", "ort")
        assert result.exit_code == 0, result.output
        assert "layers are within bounds" in result.stdout

    def break_layer(self, run: Path) -> None:
        """Break a layer as a wrong pass would: compile has written the graph so."""
        break_layer(run, "ort", SCALE["ort"], grow)
        record = json.loads((run / "run.json").read_text())
        outputs = record["stages"]["compile"]["outputs"]
        outputs["onnx/ort/model.onnx"] = sha256_of_file(run / "onnx/ort/model.onnx")
        (run / "run.json").write_text(json.dumps(record))

    def test_broken_after_compile(self, run_folder: Path):
        break_layer(run_folder, "ort", SCALE["ort"], grow)
        result = self.run("--run", str(run_folder), "--target", "ort")
        assert result.exit_code == 1
        assert "onnx/ort/model.onnx" in result.stderr

    def test_broken(self, run_folder: Path):
        self.break_layer(run_folder)
        result = self.run("--run", str(run_folder), "--target", "ort")
        assert result.exit_code == 3
        assert BROKEN in result.stdout
        assert "own sqnr" in result.stdout
        [line] = [line for line in result.stderr.splitlines() if "treeq-export: " in line]
        assert f"ort: {BROKEN} is the first layer out of bounds" in line

    def test_json(self, run_folder: Path):
        self.break_layer(run_folder)
        result = self.run("--run", str(run_folder), "--target", "ort", "--json")
        assert result.exit_code == 3
        record = json.loads(result.stdout)
        assert record["layer"] == BROKEN
        assert record["parity"]["accumulators_equal"] is True
        limit = ["--threshold-db", "-100"]
        result = self.run("--run", str(run_folder), "--target", "ort", "--json", *limit)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["layer"] is None

    def test_target_that_is_not_compiled(self, finished_run: Path):
        result = self.run("--run", str(finished_run), "--target", "portable")
        assert result.exit_code == 1
        assert "portable/model.onnx: missing" in result.stderr


def descendants(before: list[int], layer: int) -> set[int]:
    return {index for index, mask in enumerate(before) if mask >> layer & 1}


def random_network(rng: random.Random, num: int) -> list[int]:
    """Each layer reads up to three earlier ones."""
    before: list[int] = []
    for layer in range(num):
        mask = 1 << layer
        for parent in rng.sample(range(layer), min(layer, rng.randint(0, 3))):
            mask |= before[parent]
        before.append(mask)
    return before


def test_departure_of_one_fault_in_any_network():
    rng = random.Random(0)
    for _ in range(300):
        before = random_network(rng, rng.randint(1, 40))
        fault = rng.randrange(len(before))
        bad = descendants(before, fault)
        asked: list[int] = []

        def departs(layer: int, asked: list[int] = asked, bad: set[int] = bad) -> bool:
            asked.append(layer)
            return layer in bad

        assert find_departure(before, departs) == fault
        assert len(asked) == len(set(asked))


def test_departure_of_several_faults_is_one_that_nothing_faulty_feeds():
    rng = random.Random(1)
    for _ in range(300):
        before = random_network(rng, rng.randint(2, 40))
        faults = set(rng.sample(range(len(before)), 2))
        bad = set().union(*(descendants(before, fault) for fault in faults))
        found = find_departure(before, lambda layer, bad=bad: layer in bad)
        assert found in faults
        assert not any(before[found] >> fault & 1 for fault in faults - {found})


def test_departure_asks_few_questions():
    chain = [(1 << layer + 1) - 1 for layer in range(256)]
    asked: list[int] = []

    def departs(layer: int) -> bool:
        asked.append(layer)
        return layer >= 77

    assert find_departure(chain, departs) == 77
    assert len(asked) <= 9
    assert find_departure(chain, lambda _: False) is None
    assert find_departure([], lambda _: True) is None


def run_in_ort(model: ir.Model, inputs: Any) -> Any:
    serialized = ir.to_proto(model).SerializeToString()
    with OrtRunner(serialized, threads=1) as runner:
        return runner.run({name: inputs[name] for name in runner.input_names})


@pytest.mark.parametrize("fault", ["attn1.to_k", "norm1.linear", None])
def test_departure_in_a_graph_that_can_only_be_run_as_a_whole(
    fault: str | None, compiled_dit: Any, copy_target: Make
):
    """What an engine allows: no layer alone. ONNX Runtime takes the engine's place."""
    names = [layer.name for layer in compiled_dit.plan.layers]
    broken = next((name for name in names if name.endswith(f"1.{fault}")), None)
    run = copy_target("portable")
    if broken is not None:
        break_layer(run, "portable", f"{broken}.weight_quantized_scale", lambda scale: scale * 3)
    model = load_compiled(run, "portable")
    quantized = quantize_model(compiled_dit.denoiser, compiled_dit.plan, compiled_dit.tensors)
    trace = trace_reference(quantized, compiled_dit.denoiser.make_example_inputs(2, 3))
    steps: list[float] = []
    sites = read_layers(model)
    record = bisect_network("engine", model, sites, trace, run_in_ort, 40.0, steps.append)
    assert record.layer == record.departed == broken
    assert record.num_examined == len(steps) < len(sites)
    assert record.parity is None
    if broken is not None:
        [reason] = record.reasons
        assert reason.startswith("inside the network ")
        assert reason.endswith(" dB < 40 dB")


def test_an_engine_that_is_not_there(compiled_dit: Any):
    with pytest.raises(RunnerError, match=r"sm_89/manifest\.json: cannot be read"):
        bisect(compiled_dit, compiled_dit.run, "engines/tensorrt-rtx/tensorrt/sm_89")


def test_a_prefix_becomes_an_engine_which_needs_a_gpu(
    make_layer: Make, make_model: Make, tmp_path: Path
):
    """Built here by TensorRT-RTX, as far as a machine without a GPU goes."""
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    model = lower(make_model(make_layer(), make_layer(name="blocks.1.fc")), "tensorrt")
    site = read_layers(model)[0]
    profile = {"x": ShapeRange(min=[1, 3, 64], opt=[2, 3, 64], max=[2, 3, 64])}
    manifest = EngineManifest(
        treeq_version="0",
        runtime="tensorrt-rtx",
        runtime_version=load_runtime("tensorrt-rtx").version,
        gpu="sm_89",
        target="tensorrt",
        key="",
        engine_sha256="",
        engine_bytes=0,
        graph_sha256="",
        data_sha256=None,
        plan_sha256="",
        profile=profile,
        bits={},
        plugins=[],
        build_s=0.0,
        peak_bytes=0,
        verifier=VerifierSummary(
            num_quantized=0,
            num_plugins=0,
            num_int8_gemms=0,
            num_weight_only=0,
            num_engine_layers=0,
        ),
    )
    save_record(tmp_path / "manifest.json", manifest)
    prefix = cut_prefix(model, site)
    assert [node.op_type for node in prefix.graph].count("QLinear") == 1
    message = f"^{tmp_path}: built for sm_89, but this machine has no NVIDIA GPU"
    with pytest.raises(RunnerError, match=message) as caught:
        run_as_engine(prefix, {}, tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_before_follow_the_graph(compiled_dit: Any):
    model = load_compiled(compiled_dit.run, "portable")
    sites = read_layers(model)
    before = dict(zip([s.name for s in sites], layers_before(model, sites), strict=True))
    place = {site.name: index for index, site in enumerate(sites)}

    def feeds(first: str, second: str) -> bool:
        return bool(before[second] >> place[first] & 1)

    block = "transformer_blocks.1"
    assert feeds(BROKEN, f"{block}.attn1.to_q")
    assert feeds(f"{block}.norm1.linear", f"{block}.attn1.to_q")
    assert feeds(f"{block}.attn1.to_q", f"{block}.attn1.to_out.0")
    assert not feeds(f"{block}.attn1.to_q", f"{block}.attn1.to_k")
    assert not feeds(BROKEN, f"{block}.norm1.linear")
    assert not feeds(f"{block}.attn1.to_q", BROKEN)
    assert all(feeds(name, name) for name in before)


def test_a_layer_inside_a_fused_node_has_only_itself(compiled_dit: Any):
    model = load_compiled(compiled_dit.run, "portable")
    sites = [LayerSite("a", "", ""), LayerSite("b", "", "")]
    assert layers_before(model, sites) == [0b01, 0b10]
