"""From a float32 ONNX model to one that computes in 8 bits."""
