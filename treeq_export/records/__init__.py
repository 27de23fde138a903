"""Results of the stages, as records. One record, many views: terminal, JSON and HTML read these.

search.json: SearchRecord; finetune.json: FinetuneRecord; compile.json: CompileRecord; parity.json:
ParityRecord; bench.json: BenchRecord; quality.json: QualityRecord; compare.json: CompareRecord;
build.json: BuildRecord.
"""

from treeq_export.records.base import GateResult, Record, SealedRecord, load_record, save_record
from treeq_export.records.build import BuildRecord, BuiltEngine, EngineManifest, VerifierSummary
from treeq_export.records.compare import CompareRecord, CompareRow, Spread
from treeq_export.records.engines import (
    EMULATED,
    ORT_CPU,
    AuditLayer,
    BenchMemory,
    BenchRecord,
    BenchRow,
    CompiledTarget,
    CompileRecord,
    LayerParity,
    ParityRecord,
    Speedup,
    TargetParity,
)
from treeq_export.records.gates import check_gates, gate_results
from treeq_export.records.plans import (
    FinetunePoint,
    FinetuneRecord,
    SearchCost,
    SearchFinalist,
    SearchNode,
    SearchPoint,
    SearchRecord,
)
from treeq_export.records.quality import BaselineQuality, QualityRecord, QualityScores, SeedQuality

__all__ = [
    "EMULATED",
    "ORT_CPU",
    "AuditLayer",
    "BaselineQuality",
    "BenchMemory",
    "BenchRecord",
    "BenchRow",
    "BuildRecord",
    "BuiltEngine",
    "CompareRecord",
    "CompareRow",
    "CompileRecord",
    "CompiledTarget",
    "EngineManifest",
    "FinetunePoint",
    "FinetuneRecord",
    "GateResult",
    "LayerParity",
    "ParityRecord",
    "QualityRecord",
    "QualityScores",
    "Record",
    "SealedRecord",
    "SearchCost",
    "SearchFinalist",
    "SearchNode",
    "SearchPoint",
    "SearchRecord",
    "SeedQuality",
    "Speedup",
    "Spread",
    "TargetParity",
    "VerifierSummary",
    "check_gates",
    "gate_results",
    "load_record",
    "save_record",
]
