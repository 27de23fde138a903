"""The `treeq` ops in standard ONNX operators: what a pass or a function body writes."""
