"""Reading files and texts that somebody else may have written, damaged or cut short.

Every JSON, YAML, safetensors and text file is read here, so that each reader has the same limits
(limits.py) and says each fault in one line: the file, what is wrong with it, and the remedy. The
caller names the class of the error and the remedy, a sentence that is true for every fault of the
file. Graphs are read by runners/graph_file.py.
"""

from treeq_export.reading.files import read_bytes, read_text
from treeq_export.reading.json_files import (
    first_problem,
    parse_json,
    parse_record,
    read_json,
    read_object,
    read_record,
)
from treeq_export.reading.safetensors_files import TensorFile, load_safetensors, open_safetensors
from treeq_export.reading.yaml_files import parse_yaml, read_yaml

__all__ = [
    "TensorFile",
    "first_problem",
    "load_safetensors",
    "open_safetensors",
    "parse_json",
    "parse_record",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_object",
    "read_record",
    "read_text",
    "read_yaml",
]
