"""Mobile form: a MobileI2V pipeline as graphs for ONNX Runtime and Core ML."""

from .blueprint import ParityError
from .blueprints import Clip
from .bundle import export
from .contracts import Manifest, read_manifest

__all__ = ["Clip", "Manifest", "ParityError", "export", "read_manifest"]
