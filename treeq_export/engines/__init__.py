"""The build stage: TensorRT engines of a run's compiled graphs, verified against the plan."""

from treeq_export.engines.options import BuildOptions
from treeq_export.engines.stage import RECORD_FILE, run_build

__all__ = ["RECORD_FILE", "BuildOptions", "run_build"]
