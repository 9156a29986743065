"""One ONNX bundle for all tests that only need a bundle."""

from __future__ import annotations

import pytest

from tests.exporters.helpers import Exported, export_one_stream


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_one_stream(tmp_path_factory.mktemp("deployed") / "bundle", guarded=True)
