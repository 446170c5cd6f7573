"""SwiftI2V: one photo and a sentence in, a 2K video out, segment by segment.

Names load on first use, so that ``import swifti2v`` and ``swifti2v --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import Chunk, Event, Grid, Request, RunError, Size, UsageError
    from .mobile import MobileI2VPipeline
    from .models.mobile_dit import MobileTransformer3DModel
    from .models.nano_vae import NanoVAE
    from .models.wan import SwiftI2VTransformer3DModel
    from .pipeline import SwiftI2VPipeline
    from .segments import CSG

_HOMES = {
    "CSG": "segments",
    "Chunk": "core",
    "Event": "core",
    "Grid": "core",
    "MobileI2VPipeline": "mobile",
    "MobileTransformer3DModel": "models.mobile_dit",
    "NanoVAE": "models.nano_vae",
    "Request": "core",
    "RunError": "core",
    "Size": "core",
    "SwiftI2VPipeline": "pipeline",
    "SwiftI2VTransformer3DModel": "models.wan",
    "UsageError": "core",
}

__all__ = [
    "CSG",
    "Chunk",
    "Event",
    "Grid",
    "MobileI2VPipeline",
    "MobileTransformer3DModel",
    "NanoVAE",
    "Request",
    "RunError",
    "Size",
    "SwiftI2VPipeline",
    "SwiftI2VTransformer3DModel",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'swifti2v' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
