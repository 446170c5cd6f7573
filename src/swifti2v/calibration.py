"""What this machine adds to a plan: its speeds, and the size of the process beside its tensors.

``doctor`` measures it once (seconds) and keeps it in the user's cache folder; ``plan`` takes it as an argument.
No torch is imported until something is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .machine import bfloat16_instructions

SCHEMA = 1
# Real networks took more than the small run's constant: 99, 124 and 166 MB at 640x384, 1280x704 and 2560x1408.
REAL_NETWORKS_BYTES = 110_000_000
# A small clip through the whole program; what its plan does not explain is this machine's constant.
_SMALL_RUN = """
import tempfile
from pathlib import Path
import torch
from swifti2v import presets
from swifti2v.costs import EncoderCost, MobileDiTCost, NanoVAECost, Networks
from swifti2v.media import write_video
from swifti2v.meters import peak_rss
import swifti2v.models.nano_vae
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.plan import plan
from swifti2v.tiny import tiny_pipeline
import swifti2v.journal
with tempfile.TemporaryDirectory() as folder:
    tiny_pipeline("nano").save_pretrained(folder)
    pipeline = SwiftI2VPipeline.from_pretrained(folder, dtype=torch.bfloat16)
pipeline.preset = preset = presets.get("nano")
parts = pipeline.components
vae = NanoVAECost.from_config(dict(parts["vae"].config))
one, two = (MobileDiTCost.from_config(dict(parts[n].config), 128) for n in ("transformer", "transformer_2"))
networks = Networks(EncoderCost.from_t5(parts["text_encoder"].config.to_dict(), 128), one, two, vae, vae)
request, _ = presets.resolve(preset, prompt="", seed=0, size="640x384", num_frames=17, num_inference_steps=1,
                             num_inference_steps_2=1)
photo = torch.zeros(1, 3, 1, request.height, request.width)
with tempfile.TemporaryDirectory() as folder:
    write_video(Path(folder) / "x.mp4", (chunk.frames for chunk in pipeline.stream(photo, request)), fps=15)
explained = plan(request, preset, networks=networks)
print(peak_rss() - explained.activation_bytes - explained.weight_bytes)
"""


@dataclass(frozen=True)
class Calibration:
    """Measured constants. Rates are per second: FLOPs of matrix products and of 3x3 convolutions, bytes copied.

    ``rss_bytes``: resident size beyond weights and activations (libraries, kernels, allocator slack).
    ``encode_pixels``: written as H.264. The defaults, for a machine not measured yet, are those of a 2-core
    AVX-512 virtual machine.
    """

    float32_flops: float = 140e9
    bfloat16_flops: float = 590e9
    conv_flops: float = 400e9
    copy_bytes: float = 5e9
    encode_pixels: float = 15e6
    rss_bytes: int = 650_000_000
    measured: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype that ``memory.choose_placement`` takes on this CPU."""
        return 2 if bfloat16_instructions() else 4

    @property
    def flops(self) -> float:
        return self.bfloat16_flops if self.itemsize == 2 else self.float32_flops

    def save(self, path: Path | None = None) -> Path:
        """Write as JSON to ``path`` (the user's cache folder if None), whole or not at all."""
        path = path or cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(".new")
        made.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2))
        made.replace(path)
        return path


def cache_file() -> Path:
    return Path.home() / ".cache" / "swifti2v" / "calibration.json"


def stored_calibration(path: Path | None = None) -> Calibration | None:
    """What ``doctor`` measured here; None if it has not, or wrote another version or a damaged file."""
    try:
        values = json.loads((path or cache_file()).read_text())
        if values.pop("schema", None) != SCHEMA:
            return None
        return Calibration(**values)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def calibrate() -> Calibration:
    """Measure this machine in a few seconds: four speeds here, the process's size in a fresh one."""
    import torch

    from .memory import matmul_rate

    return Calibration(
        float32_flops=1e9 * matmul_rate(torch.float32),
        bfloat16_flops=1e9 * matmul_rate(torch.bfloat16),
        conv_flops=_conv_rate(),
        copy_bytes=_copy_rate(),
        encode_pixels=_encode_rate(),
        rss_bytes=_constant_rss(),
        measured=True,
    )


def _constant_rss() -> int:
    done = subprocess.run([sys.executable, "-c", _SMALL_RUN], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) + REAL_NETWORKS_BYTES


def _conv_rate() -> float:
    """FLOP/s of the convolutions of nano's decoder, in the faster dtype."""
    import torch
    from torch.nn.functional import conv2d

    channels, best = 96, 0.0
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, channels, 88, 160, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.ones(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        seconds = _fastest(partial(conv2d, x, w, padding=1))
        best = max(best, 2 * 9 * channels**2 * 88 * 160 / seconds)
    return best


def _copy_rate() -> float:
    """Bytes a second, read and written, of a copy much larger than the caches."""
    import torch

    x = torch.ones(32 * 2**20)
    return 2 * x.nbytes / _fastest(lambda: x.clone())


def _encode_rate() -> float:
    """Pixels a second of H.264 with this project's settings, on a picture that moves and has some noise."""
    import tempfile

    import torch

    from .media import write_video

    frames, height, width = 12, 352, 640
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.functional.interpolate(
        torch.rand(1, 3, height // 8, width // 8 + 8, generator=generator), scale_factor=8, mode="bicubic"
    )
    moving = torch.stack([base[0, :, :, 4 * i : 4 * i + width] for i in range(frames)], dim=1)[None]
    moving = (moving * 2 - 1 + 0.05 * torch.randn(moving.shape, generator=generator)).clamp(-1, 1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_video(Path(folder) / "rate.mp4", [moving], fps=15)
        return frames * height * width / (time.perf_counter() - start)


def _fastest(call: Callable[[], object], rounds: int = 4) -> float:
    """Seconds of the fastest of some rounds, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
