"""The names of all targets, for the recipe and the command line, which load without a framework."""

from typing import Literal, get_args

# ONNX Runtime runs these graphs as they are.
GraphName = Literal["portable", "ort"]
# TensorRT builds engines of these graphs.
EngineName = Literal["tensorrt", "tensorrt-native"]
TargetName = Literal[GraphName, EngineName]

GRAPHS: tuple[GraphName, ...] = get_args(GraphName)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

PORTABLE: GraphName = "portable"
ORT: GraphName = "ort"
TENSORRT: EngineName = "tensorrt"
TENSORRT_NATIVE: EngineName = "tensorrt-native"
# The unquantized graph of the same exporter is compiled in every run.
FP32 = "fp32"
