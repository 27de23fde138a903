"""Records of built engines: manifest.json and layers.json beside each, build.json of a run."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from treeq_export.records.base import Record, SealedRecord

Planned = Literal["quantized", "weight-only", "floating-point"]


class VerifiedLayer(Record):
    """What became of one layer in an engine.

    Attributes:
        name: The layer as in the checkpoint; of a planned floating-point layer, its ONNX node.
        planned: What the plan wants.
        became: "plugin", "int8 gemm", or type and data types of what was found instead.
        engine_layers: Names of the engine's layers that do it.
        passed: Whether the engine obeys the plan.
    """

    name: str
    planned: Planned
    became: str
    engine_layers: list[str]
    passed: bool


class VerifierSummary(Record):
    """The verifier's table in numbers.

    Attributes:
        num_quantized: Layers whose weight and activation the plan quantizes.
        num_plugins: Quantized layers that became plugins.
        num_int8_gemms: Quantized layers that became Int8 gemms.
        num_weight_only: Layers of which only the weight is quantized.
        num_engine_layers: Layers of the engine.
    """

    num_quantized: int
    num_plugins: int
    num_int8_gemms: int
    num_weight_only: int
    num_engine_layers: int

    @property
    def passed_fraction(self) -> float:
        """Part of the quantized layers that are a plugin or an Int8 gemm; 1 if there are none."""
        done = self.num_plugins + self.num_int8_gemms
        return done / self.num_quantized if self.num_quantized else 1.0


class VerifierTable(SealedRecord):
    """Content of layers.json: every planned layer and what became of it."""

    summary: VerifierSummary
    layers: list[VerifiedLayer]


class PluginReference(Record):
    """A plugin that has to be registered before an engine is loaded."""

    name: str
    version: str
    namespace: str


RuntimeName = Literal["tensorrt", "tensorrt-rtx"]
_Target = Annotated[str, StringConstraints(pattern=r"^tensorrt(-native)?$")]
_Gpu = Annotated[str, StringConstraints(pattern=r"^sm_\d{2,3}[a-z]?$")]


class ShapeRange(Record):
    """Smallest, tuned-for and largest shape of one input."""

    min: list[int] = Field(min_length=1)
    opt: list[int]
    max: list[int]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        sizes = list(zip(self.min, self.opt, self.max, strict=True))
        if not all(1 <= low <= usual <= high for low, usual, high in sizes):
            raise ValueError("expected 1 <= min <= opt <= max")
        return self


class EngineManifest(SealedRecord):
    """What an engine is, and where it may be loaded.

    Attributes:
        treeq_version: Version of the package that built the engine.
        runtime: "tensorrt" or "tensorrt-rtx".
        runtime_version: The engine loads in exactly this version.
        gpu: GPU architecture, such as "sm_89".
        target: Compiled target that it was built from.
        key: Digest of all that the engine depends on.
        engine_sha256: Digest of the engine file.
        engine_bytes: Size of the engine file.
        graph_sha256: Digest of the ONNX file.
        data_sha256: Digest of the graph's external data; None if the graph has none.
        plan_sha256: Digest of the plan, as the graph's metadata names it.
        profile: Shapes by input.
        bits: Weight and activation bits by layer; activation 0 is not quantized.
        plugins: Plugins that have to be registered before it is loaded.
        plugin_kind: A library has the plugins, "library".
        note: None; kept for readers of older manifests.
        build_s: Seconds of parsing and building.
        peak_bytes: Largest resident size of the process that built it.
        verifier: What the verifier counted.
    """

    treeq_version: str
    runtime: RuntimeName
    runtime_version: str
    gpu: _Gpu
    target: _Target
    key: str
    engine_sha256: str
    engine_bytes: int
    graph_sha256: str
    data_sha256: str | None
    plan_sha256: str
    profile: dict[str, ShapeRange] = Field(min_length=1)
    bits: dict[str, tuple[int, int]]
    plugins: list[PluginReference]
    build_s: float
    peak_bytes: int
    verifier: VerifierSummary
    plugin_kind: Literal["library"] = "library"
    note: str | None = None


class BuiltEngine(Record):
    """One engine of a run.

    Attributes:
        path: Folder of the engine, relative to the run folder.
        how: "built", "from cache" or "up to date".
        manifest: Content of the manifest.json beside the engine.
    """

    path: str
    how: Literal["built", "from cache", "up to date"]
    manifest: EngineManifest


class BuildRecord(Record):
    """Result of build: every engine of the run that this or an earlier call has built."""

    engines: list[BuiltEngine]
