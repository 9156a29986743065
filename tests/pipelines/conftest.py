"""Settings of the pipeline tests."""

from __future__ import annotations

import logging

logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # it prints a note per class that would use torchvision
