"""The last step of every export: the manifest, and a bundle that opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.exporters.weight_sources import keep_the_rest
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.exporters.write import write_manifest


def finished(manifest: Manifest, weights: WeightFile, left_out: Mapping[str, Tensor] | None) -> Manifest:
    """Write the manifest beside the other files of a bundle, and return it as it is read back.

    Args:
        manifest: What to write, without its list of files.
        weights: The weight file. It is removed if it is left out, and the manifest says what it was made of.
        left_out: The model's state dict if the bundle is to do without the weights, see `plain_tensors`.

    Raises:
        BundleError: The bundle does not open.
    """
    folder = weights.path.parent
    if left_out is not None:
        manifest = dataclasses.replace(manifest, weight_sources=keep_the_rest(weights, left_out, manifest.model))
    write_manifest(folder, manifest, weights.entry)
    read = open_bundle(folder, verify_hashes=False).manifest  # they were made a moment ago
    if left_out is not None:
        weights.path.unlink()
    return read
