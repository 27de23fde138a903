"""Naming the first layer that is out of bounds.

`find_first_fault` looks at every layer alone; where only the whole network can be run, such as an
engine, `find_departure` searches the graph with as few runs as it can.
"""

from treeq_export.bisect.departure import find_departure, layers_before
from treeq_export.bisect.own import BisectRecord, find_first_fault, run_bisect

__all__ = ["BisectRecord", "find_departure", "find_first_fault", "layers_before", "run_bisect"]
