"""Imported once by the server that workers are forked from: what they all need, and no word of it on stderr."""

from __future__ import annotations

import logging

logging.disable(logging.WARNING)

from . import worker  # noqa: E402, F401
