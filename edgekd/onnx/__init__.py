"""An ONNX model and its numbers: export, file, graph, inference, comparison."""
