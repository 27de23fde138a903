"""Results of the stages, as records. One record, many views: terminal, JSON and HTML read these.

search.json: SearchRecord; finetune.json: FinetuneRecord; compile.json: CompileRecord; parity.json:
ParityRecord; bench.json: BenchRecord; quality.json: QualityRecord; compare.json: CompareRecord.
"""

from treeq_export.records.base import GateResult, Record, load_record, save_record
from treeq_export.records.compare import CompareRecord, CompareRow, Spread
from treeq_export.records.engines import (
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
    "AuditLayer",
    "BaselineQuality",
    "BenchMemory",
    "BenchRecord",
    "BenchRow",
    "CompareRecord",
    "CompareRow",
    "CompileRecord",
    "CompiledTarget",
    "FinetunePoint",
    "FinetuneRecord",
    "GateResult",
    "LayerParity",
    "ParityRecord",
    "QualityRecord",
    "QualityScores",
    "Record",
    "SearchCost",
    "SearchFinalist",
    "SearchNode",
    "SearchPoint",
    "SearchRecord",
    "SeedQuality",
    "Speedup",
    "Spread",
    "TargetParity",
    "check_gates",
    "gate_results",
    "load_record",
    "save_record",
]
