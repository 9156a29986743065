"""The standard library's module has what is used here."""

from re import *  # noqa: F403
