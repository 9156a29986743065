"""From an ONNX bundle to TensorRT engines and a session over them. No engine has been built yet: see docs/tensorrt.md."""

from bwcache_compile.exporters.tensorrt.engines import build, load, prepare
from bwcache_compile.exporters.tensorrt.operators import unlisted_operators

__all__ = ["build", "load", "prepare", "unlisted_operators"]
