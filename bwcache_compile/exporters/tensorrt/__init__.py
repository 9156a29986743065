"""From an ONNX bundle to TensorRT engines."""
