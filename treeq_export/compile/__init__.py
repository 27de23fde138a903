"""Compile: the quantized model to ONNX graphs, one written list of passes per target."""
