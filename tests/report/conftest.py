"""A small complete run, made by hand: two blocks, three layers, two targets."""

import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from treeq_export.plan import LayerPlan, ModelRecord, Plan, StrategyRecord, TreePath, save_plan
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.recipe import ModelSection, Recipe
from treeq_export.records import (
    AuditLayer,
    BaselineQuality,
    BenchMemory,
    BenchRecord,
    BenchRow,
    BuildRecord,
    BuiltEngine,
    CompiledTarget,
    CompileRecord,
    EngineManifest,
    FinetunePoint,
    FinetuneRecord,
    GateResult,
    LayerParity,
    ParityRecord,
    QualityRecord,
    QualityScores,
    SearchCost,
    SearchFinalist,
    SearchNode,
    SearchPoint,
    SearchRecord,
    SeedQuality,
    Speedup,
    TargetParity,
    VerifierSummary,
    save_record,
)
from treeq_export.records.build import ShapeRange
from treeq_export.report import Report, figures, make_report, print_report, write_report

# A 2x1 greyscale PNG.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000200000001080000000043bd2a"
    "900000000b4944415478da63f8ff1f0003000201ff2dd27c110000000049454e44ae426082"
)
LAYER_NAMES = ("blocks.0.attn.to_q", "blocks.0.ff.up", "blocks.1.ff.up")


def _make_layer(name: str, block: int, position: str, bits: tuple[int, int | None]) -> LayerPlan:
    weight, activation = bits
    return LayerPlan(
        name=name,
        in_features=8,
        out_features=16,
        tree=TreePath(block=block, position=position, leaf=block),
        weight=WeightFormat(bits=weight),
        activation=ActivationFormat(
            bits=activation, scale="none" if activation is None else "token_rms"
        ),
        branch=BranchFormat(b_in=1, b_out=1, rank=2) if block else None,
    )


@pytest.fixture
def plan() -> Plan:
    """Weights 3, 4 and 8 bit, activations 4, 5 bit and floating point."""
    return Plan(
        format_version=1,
        model=ModelRecord(name="tiny", class_name="DiTTransformer2DModel", num_parameters=1000),
        checkpoint_sha256="5f" * 32,
        strategy=StrategyRecord(name="uniform", options={}),
        layers=(
            _make_layer(LAYER_NAMES[0], 0, "attn.to_q", (3, 4)),
            _make_layer(LAYER_NAMES[1], 0, "ff.up", (4, 5)),
            _make_layer(LAYER_NAMES[2], 1, "ff.up", (8, None)),
        ),
    )


@pytest.fixture
def compiled() -> CompileRecord:
    audit = [
        AuditLayer(name=LAYER_NAMES[0], op_type="MatMulIntegerToFloat", integer=True),
        AuditLayer(name=LAYER_NAMES[1], op_type="MatMulIntegerToFloat", integer=True),
        AuditLayer(name=LAYER_NAMES[2], op_type="MatMul", integer=False, weight_only=True),
    ]
    return CompileRecord(
        targets=[
            CompiledTarget(
                target=name,
                path=f"onnx/{name}/model.onnx",
                size_bytes=size,
                sha256=digest * 32,
                audit=[] if name == "fp32" else audit,
            )
            for name, size, digest in (
                ("ort", 800, "a1"),
                ("portable", 2000, "b2"),
                ("fp32", 4200, "c3"),
            )
        ]
    )


def _make_layers(worst: float) -> list[LayerParity]:
    return [
        LayerParity(
            name=name,
            sqnr_db=own,
            max_abs_error=0.0 if own == math.inf else 2e-6,
            equal_code_fraction=codes,
            accumulators_equal=None if codes is None else True,
            propagated_sqnr_db=55.5,
            quantization_sqnr_db=17.25,
        )
        for name, own, codes in zip(
            LAYER_NAMES, (math.inf, worst, 111.5), (1.0, 0.9995, None), strict=True
        )
    ]


@pytest.fixture
def make_parity() -> Callable[..., ParityRecord]:
    """Return a function of the worst layer of "ort": below 40 dB it fails its gate."""

    def make(worst: float = 96.5) -> ParityRecord:
        targets = []
        for name, end_to_end, least in (("portable", 51.25, 96.5), ("ort", 47.5, worst)):
            gates = [
                GateResult.of(f"{name} end-to-end sqnr_db", end_to_end, 40.0, at_least=True),
                GateResult.of(f"{name} least layer sqnr_db", least, 40.0, at_least=True),
            ]
            targets.append(
                TargetParity(
                    target=name,
                    passed=all(gate.passed for gate in gates),
                    sqnr_db=end_to_end,
                    max_abs_error=0.0025,
                    layers=_make_layers(least),
                    gates=gates,
                )
            )
        return ParityRecord(batch_size=8, seed=3, targets=targets)

    return make


@pytest.fixture
def bench() -> BenchRecord:
    """Two batch sizes, two baselines; "ort" is slower than float32 at batch 2."""
    times = {"torch_fp32": 8.0, "ort_fp32": 6.0, "portable": 4.0, "ort": 7.5}
    rows = [
        BenchRow(
            target=target,
            batch=batch,
            median_ms=time * batch / 2,
            all_times_ms=[time * batch / 2 - 0.5, time * batch / 2, time * batch],
        )
        for batch in (2, 8)
        for target, time in times.items()
    ]
    speedups = [
        Speedup(
            target=target,
            baseline=baseline,
            batch=batch,
            ratio=times[baseline] / times[target],
            low=times[baseline] / times[target] - 0.125,
            high=times[baseline] / times[target] + 0.125,
        )
        for batch in (2, 8)
        for baseline in ("torch_fp32", "ort_fp32")
        for target in ("portable", "ort")
    ]
    memory = BenchMemory(
        target="portable",
        after_load_bytes=52_000_000,
        peak_bytes=71_000_000,
        load_s=0.25,
        file_bytes=2000,
    )
    environment = {"cpu": {"model": "Test CPU", "cores": 2}, "versions": {"numpy": "2.4.0"}}
    return BenchRecord(rows=rows, memory=[memory], speedups=speedups, environment=environment)


@pytest.fixture
def quality() -> QualityRecord:
    full = QualityScores(frechet_distance=3.25, class_accuracy=0.985)
    quantized = QualityScores(frechet_distance=3.75, class_accuracy=0.97, psnr_db=24.5)
    return QualityRecord(
        num_samples=100,
        runner="portable",
        conditioning="labels",
        seeds=[SeedQuality(seed=7, fp=full, quantized=quantized)],
        fp=full,
        quantized=quantized,
        grids={"quantized": "samples/quantized.png", "fp": "samples/fp.png"},
        gates=[GateResult.of("quality frechet ratio", 3.75 / 3.25, 1.5, at_least=False)],
    )


@pytest.fixture
def baseline() -> BaselineQuality:
    """Uniform bits, worse than ours."""
    return BaselineQuality(
        strategy="uniform",
        weight_bits=3.0,
        activation_bits=3.5,
        scores=QualityScores(frechet_distance=9.5, class_accuracy=0.8, psnr_db=18.5),
        network_mse=0.0125,
    )


@pytest.fixture
def search() -> SearchRecord:
    """A tree of two leaves, three configurations at its root, two branch shapes for a layer."""
    nodes = [
        ("blocks 0..1", 0, 0, 1, 3.25, 4.0),
        ("0: attn.to_q", 1, 0, 0, 3.0, 4.0),
        ("1: ff.up", 1, 1, 1, 8.0, 4.0),
    ]
    points = [(2.0, 0.5, True, False), (3.0, 0.25, True, True), (3.5, 0.3, False, False)]
    trials = [
        {"b_in": 2, "b_out": 2, "rank": 1, "num_parameters": 48, "error": 0.02},
        {"b_in": 1, "b_out": 1, "rank": 2, "num_parameters": 48, "error": 0.03},
    ]
    return SearchRecord(
        strategy="tss",
        noise=1.0,
        budget={"weight_bits": 3.0, "activation_bits": 3.0},
        cost=SearchCost(
            num_leaves=2, num_merges=1, num_evaluations=288, num_block_runs=512, estimate_s=150.0
        ),
        num_measured=250,
        num_from_journal=50,
        seconds=121.5,
        network_mse=0.25,
        nodes=[
            SearchNode(
                name=name,
                depth=depth,
                first_leaf=first,
                last_leaf=last,
                num_configurations=16,
                weight_bits=weight,
                activation_bits=activation,
            )
            for name, depth, first, last, weight, activation in nodes
        ],
        front=[
            SearchPoint(
                weight_bits=bits,
                activation_bits=bits,
                size_bytes=int(1e6 * bits),
                mse=mse,
                kept=kept,
                chosen=chosen,
            )
            for bits, mse, kept, chosen in points
        ],
        branches={"blocks.1.ff.up": trials},
        finalists=[
            SearchFinalist(
                weight_bits=bits,
                activation_bits=3.0,
                network_mse=0.25,
                final_mse=0.26,
                calibrated_mse=mse,
                chosen=chosen,
            )
            for bits, mse, chosen in ((3.0, 0.125, True), (2.5, None, False))
        ],
    )


@pytest.fixture
def finetune() -> FinetuneRecord:
    curve = [(0, None, 0.9, 0.008), (100, 0.7, 0.6, 0.003), (200, 0.5, 0.55, 0.004)]
    return FinetuneRecord(
        mode="peft",
        base_tensors_sha256="d4" * 32,
        tensors_sha256="e5" * 32,
        num_trained=1234,
        steps=200,
        best_step=100,
        mse_before=0.008,
        mse_after=0.003,
        stopped_early=True,
        seconds=75.0,
        curve=[
            FinetunePoint(step=step, train_loss=train, held_out_loss=loss, held_out_mse=mse)
            for step, train, loss, mse in curve
        ],
    )


@pytest.fixture
def searched_run(
    run: Path,
    quality: QualityRecord,
    baseline: BaselineQuality,
    search: SearchRecord,
    finetune: FinetuneRecord,
) -> Path:
    """The same run, searched by tss, finetuned, and with a baseline beside it."""
    save_record(run / "search.json", search)
    save_record(run / "finetune.json", finetune)
    seeds = [quality.seeds[0].model_copy(update={"baseline": baseline.scores})]
    grids = {**quality.grids, "baseline": "samples/baseline.png"}
    changes = {"seeds": seeds, "grids": grids, "network_mse": 0.005, "baseline": baseline}
    save_record(run / "quality.json", quality.model_copy(update=changes))
    (run / "samples" / "baseline.png").write_bytes(PNG)
    return run


@pytest.fixture
def engines(compiled: CompileRecord) -> BuildRecord:
    """An engine of a present graph with one layer not as planned, and a stale one."""

    def make(graph: str, num_plugins: int) -> BuiltEngine:
        manifest = EngineManifest(
            treeq_version="0.1.0",
            runtime="tensorrt-rtx",
            runtime_version="1.7.1",
            gpu="sm_89",
            target="tensorrt",
            key="k",
            engine_sha256="e5",
            engine_bytes=278_000_000,
            graph_sha256=graph,
            data_sha256=None,
            plan_sha256="p6",
            profile={"sample": ShapeRange(min=[1, 4], opt=[2, 4], max=[8, 4])},
            bits={},
            plugins=[],
            build_s=12.34,
            peak_bytes=10,
            verifier=VerifierSummary(
                num_quantized=2,
                num_plugins=num_plugins,
                num_int8_gemms=0,
                num_weight_only=1,
                num_engine_layers=9,
            ),
        )
        return BuiltEngine(path="engines/x", how="built", manifest=manifest)

    return BuildRecord(engines=[make(compiled.targets[0].sha256, 1), make("d4" * 32, 2)])


@pytest.fixture
def run(
    tmp_path: Path,
    plan: Plan,
    compiled: CompileRecord,
    make_parity: Callable[..., ParityRecord],
    bench: BenchRecord,
    quality: QualityRecord,
) -> Path:
    """A complete run folder; every gate passes."""
    folder = tmp_path / "runs" / "tiny"
    save_plan(folder, plan, {"blocks.0.ff.up.codes": np.zeros((16, 8), np.int8)})
    save_record(folder / "compile.json", compiled)
    save_record(folder / "parity.json", make_parity())
    save_record(folder / "bench.json", bench)
    save_record(folder / "quality.json", quality)
    for name in ("fp", "quantized"):
        path = folder / "samples" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(name="tiny-w4a4", model=ModelSection(checkpoint=str(tmp_path / "checkpoint")))


STAGES = {"search": 0.5, "calibrate": 130.0}


@pytest.fixture
def build(run: Path, recipe: Recipe) -> Callable[[], Report]:
    """Return a function that builds the report of `run` without writing files."""

    def build_now() -> Report:
        return make_report(run, stages=STAGES, recipe=recipe, commands=[])

    return build_now


@pytest.fixture
def write(run: Path, recipe: Recipe) -> Callable[[], Report]:
    """Return a function that writes the report of `run`."""

    def write_now() -> Report:
        report = make_report(
            run,
            stages=STAGES,
            recipe=recipe,
            commands=["treeq-export run recipe.yaml --out runs/tiny"],
        )
        write_report(report)
        return report

    return write_now


@pytest.fixture
def full_page(run: Path, write: Callable[[], Report]) -> Callable[[], str]:
    """Return a function that writes the report of `run` and reads its page."""

    def read() -> str:
        write()
        return (run / "report.html").read_text(encoding="utf-8")

    return read


@pytest.fixture
def page(full_page: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The same without plots, which take most of the time."""
    for name in ("draw_parity", "draw_speed", "draw_sizes"):
        monkeypatch.setattr(figures, name, lambda *_: "")
    return full_page


@pytest.fixture
def print_text() -> Callable[[Report], str]:
    """Return a function that prints a report into a string."""

    def print_now(report: Report) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        print_report(report, console)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    return print_now
