"""The bench stage: speed and memory of every target beside full precision and a peer.

One record with all raw times; terminal, JSON and HTML are views of it. A ratio comes from one
interleaved run and carries its 95 % interval.
"""

from treeq_export.bench.stage import run_bench

__all__ = ["run_bench"]
