"""Any class by its name, without a body: enough to import a pipeline that is given embeddings."""

from __future__ import annotations

__version__ = "4.57.0"


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return globals().setdefault(name, type(name, (), {}))
