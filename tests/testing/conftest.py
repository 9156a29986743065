"""One bundle for all tests here."""

from __future__ import annotations

import pytest

from tests.exporters.helpers import Exported, export_one_stream


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_one_stream(tmp_path_factory.mktemp("exported") / "bundle", guarded=True)
