"""The build stage: TensorRT engines of a run's compiled graphs, verified against the plan."""

from treeq_export.engines.options import BuildOptions
from treeq_export.engines.stage import run_build

__all__ = ["BuildOptions", "run_build"]
