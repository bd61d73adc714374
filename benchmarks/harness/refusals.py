"""Why a row is missing or red."""

from __future__ import annotations


class Unavailable(Exception):
    """A provider cannot run here; the text is the reason that the report prints."""


class GateError(Exception):
    """A provider does not compute what the case asks for; it must not be timed."""
