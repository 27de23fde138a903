"""Naming the first layer that is out of bounds.

`find_first_fault` looks at every layer alone; where only the whole network can be run, such as an
engine, `find_departure` searches the graph with as few runs as it can.
"""

from treeq_export.bisect.departure import find_departure, layers_before
from treeq_export.bisect.network import bisect_network
from treeq_export.bisect.own import find_first_fault
from treeq_export.bisect.record import BisectRecord
from treeq_export.bisect.run import run_bisect

__all__ = [
    "BisectRecord",
    "bisect_network",
    "find_departure",
    "find_first_fault",
    "layers_before",
    "run_bisect",
]
