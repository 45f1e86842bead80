"""From a float32 ONNX model to one that computes in INT8, or in FP16."""
