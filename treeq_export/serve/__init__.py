"""Serving: a Triton model repository of a run, checked before it takes its name."""

from treeq_export.serve.options import ServeOptions
from treeq_export.serve.stage import ServedRepository, run_serve

__all__ = ["ServeOptions", "ServedRepository", "run_serve"]
