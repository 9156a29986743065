"""Export programs to ONNX."""
