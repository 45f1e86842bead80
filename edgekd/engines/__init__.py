"""Engines: ONNX Runtime and TensorRT; whether a model will run; which candidate is chosen."""
