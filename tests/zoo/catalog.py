"""Every transformer class of diffusers 0.42: how it is captured, or why it is left out."""

from __future__ import annotations

import dataclasses

from tests.zoo import REFUSED, ZOO
from tests.zoo.catalog_entry import CatalogEntry
from tests.zoo.catalog_image import CATALOG_IMAGE
from tests.zoo.catalog_more import CATALOG_MORE
from tests.zoo.catalog_video import CATALOG_VIDEO
from tests.zoo.entry import Entry


def _of_zoo(entry: Entry, **fields: str) -> CatalogEntry:
    shared = {field.name: getattr(entry, field.name) for field in dataclasses.fields(Entry)}
    return CatalogEntry(**shared, **fields)  # type: ignore[arg-type]


CATALOG: dict[str, CatalogEntry] = {
    **{name: _of_zoo(entry) for name, entry in ZOO.items()},
    **{name: _of_zoo(entry, capture="region") for name, entry in REFUSED.items()},
    **CATALOG_IMAGE,
    **CATALOG_VIDEO,
    **CATALOG_MORE,
}

LEFT_OUT = {
    "DualTransformer2DModel": "a helper inside a UNet: it runs two Transformer2DModel side by side, and its output joins a residual",
    "MiniMaxMusic3RVQDepthDecoder": "no denoiser: it predicts the codebooks of one audio frame one after the other, and takes no time",
}
"""Classes that are no diffusion denoisers."""
