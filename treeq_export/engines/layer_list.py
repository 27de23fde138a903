"""The builder's own list of an engine's layers, from text (TensorRT-RTX) or JSON (TensorRT).

TensorRT-RTX logs, at ProfilingVerbosity.DETAILED, one message that begins "Layers:", a line each:

    Name: a+b_myl0_4, LayerType: gemm, Inputs: [ { Name: x, ..., Datatype: Int8, ... }, ...],
    Constants: [...], Outputs: [...], ..., Metadata: [ONNX Layer: a][ONNX Layer: b]

TensorRT's engine inspector gives the same as JSON, where a GPU is. The names of ONNX nodes survive
fusion in the metadata: what several nodes became lists all of them, and a node that became several
layers is in all of these.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from treeq_export.errors import CompileError
from treeq_export.reading import parse_record

HEADER = "Layers:"
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \["
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PLUGIN = re.compile(r"custom_layer|plugin", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|matrix_?multiply|correlation|conv|runtime_fusion", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: The builder's name.
        kind: Type of the layer, for example "gemm", "kgen" or "custom_layer".
        input_types: Data types of what it reads at run time, such as "Int8".
        constant_types: Data types of its constants.
        nodes: ONNX nodes that it was made of.
    """

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def is_plugin(self) -> bool:
        """Whether a plugin does it."""
        return _PLUGIN.search(self.kind) is not None

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product of its own, not a part of a generated kernel."""
        return not self.is_plugin and _PRODUCT.search(self.kind) is not None

    @property
    def is_int8_product(self) -> bool:
        """Whether it is a matrix product of Int8 operands."""
        return (
            self.is_product and bool(self.input_types) and set(self.input_types) == {"Int8"}
        ) and set(self.constant_types) <= {"Int8", "Float"}

    @property
    def description(self) -> str:
        """Type and data types in a few words."""
        types = "/".join(dict.fromkeys(self.input_types)) or "constant"
        return f"{types} {self.kind}"


def parse_layers(text: str) -> list[EngineLayer]:
    """Return the layers of a list in either form.

    Args:
        text: The message that begins "Layers:", or the inspector's JSON.

    Raises:
        CompileError: The text has neither form.
    """
    layers = (
        list(_from_json(text))
        if text.lstrip().startswith("{")
        else [_from_line(line) for line in text.splitlines() if line.startswith("Name: ")]
    )
    if not layers:
        raise CompileError(
            f"the builder's layer list has no layers (it begins with {text[:40]!r}). This version "
            "of the runtime writes another form; install the one that README.md names."
        )
    return layers


def _from_line(line: str) -> EngineLayer:
    found = _LINE.match(line)
    if found is None:
        raise CompileError(
            f"the builder's layer list has an unknown form: {line[:120]!r}. Install the version of "
            "the runtime that README.md names."
        )
    return EngineLayer(
        name=found["name"],
        kind=found["kind"],
        input_types=tuple(_DATATYPE.findall(found["inputs"])),
        constant_types=tuple(_DATATYPE.findall(found["constants"] or "")),
        nodes=frozenset(_ONNX_NODE.findall(line)),
    )


class _JsonLayer(BaseModel):
    name: str = Field(alias="Name")
    kind: str = Field("", alias="LayerType")
    inputs: list[dict[str, Any]] = Field([], alias="Inputs")
    constants: list[dict[str, Any]] = Field([], alias="Constants")
    metadata: str = Field("", alias="Metadata")


class _JsonList(BaseModel):
    layers: list[_JsonLayer | str] = Field([], alias="Layers")


def _from_json(text: str) -> Iterator[EngineLayer]:
    remedy = "Install the version of the runtime that README.md names."
    found = parse_record(text, _JsonList, "the layer list", error=CompileError, remedy=remedy)
    for entry in found.layers:
        if isinstance(entry, str):
            raise CompileError(
                "the engine says only the names of its layers. Build it with "
                "ProfilingVerbosity.DETAILED, as treeq-export does."
            )
        yield EngineLayer(
            name=entry.name,
            kind=entry.kind,
            input_types=_json_types(entry.inputs),
            constant_types=_json_types(entry.constants),
            nodes=frozenset(_ONNX_NODE.findall(entry.metadata)),
        )


def _json_types(tensors: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return data types: "Format/Datatype" is "Int8", or words such as "Row major linear FP16"."""
    words = {"INT8": "Int8", "FP16": "Half", "FP32": "Float", "BF16": "BFloat16", "INT32": "Int32"}
    found = []
    for tensor in tensors:
        text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "unknown")
        known = [name for word, name in words.items() if word in text.upper().split()]
        found.append(known[0] if known else text)
    return tuple(found)
