"""Tiny configurations of real diffusers models, built without a hub. Each input changes with the step."""

from tests.zoo.entry import Entry, noise
from tests.zoo.image import IMAGE
from tests.zoo.joint_image import JOINT_IMAGE
from tests.zoo.more_video import MORE_VIDEO
from tests.zoo.reading import READING
from tests.zoo.refused import REFUSED
from tests.zoo.video import VIDEO

ZOO: dict[str, Entry] = {**VIDEO, **MORE_VIDEO, **IMAGE, **JOINT_IMAGE, **READING}

__all__ = ["REFUSED", "ZOO", "Entry", "noise"]
