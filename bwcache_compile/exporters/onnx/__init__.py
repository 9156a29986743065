"""From a graph to ONNX."""
