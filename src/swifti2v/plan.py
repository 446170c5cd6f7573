"""What a request will cost in arithmetic, memory, disk and time: closed form, before anything loads.

A plan mirrors ``pipeline.stream``: the phases, which of them are open at once, and what each leaves lying
while another runs. It imports no torch and takes milliseconds. It does not know GPUs' workspaces, offloading
or quantization; seconds are a first guess from a machine's calibration (``doctor``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from . import costs
from .calibration import Calibration, calibrate, stored_calibration
from .core import Grid, Request, Size
from .costs import Networks
from .plan_text import cells, duration, line, scaled
from .segments import Window, motion_windows, windows

__all__ = ["Calibration", "Plan", "Row", "calibrate", "plan", "stored_calibration"]

if TYPE_CHECKING:
    from .arrangement import Arrangement

Phase = Literal["text", "image", "motion", "motion decode", "reference", "refine", "decode", "write"]

# Compressed bits a pixel: H.264 at this project's default quality on detailed moving photos (the upper end).
FILE_BITS_PER_PIXEL = 0.8
# Bytes a pixel of a frame of H.264 being encoded, and how many frames libx264 holds beside the chunk.
ENCODER_BYTES_PER_PIXEL = 100
FRAME_BYTES = 3 * 4  # one pixel in float32
# A layer of nano's DiT reads and writes about this many numbers a token and unit of width, besides its products.
DIT_TRAFFIC = 60
VAE_TRAFFIC = 60  # float32 frames read and written for every frame decoded


class Planned(Protocol):
    """What a plan needs of a preset (``presets.Preset``)."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> costs.Family: ...
    @property
    def grid(self) -> Grid: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def overlap_blocks(self) -> int: ...
    @property
    def carries_detail(self) -> bool: ...


@dataclass(frozen=True)
class Row:
    """One phase. ``tokens``: of its largest window; ``flops``: of all its ``forwards`` together.

    ``activation_bytes``: the peak of tensors the phase makes; ``resident_bytes``: what it leaves while other
    phases run (causal caches, the last chunk, the motion video). ``seconds``: None without a calibration.
    """

    phase: Phase
    tokens: int = 0
    windows: int = 0
    forwards: int = 0
    flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    resident_bytes: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The cost of a request: a ``Row`` a phase, and the totals. All sizes in bytes.

    ``weight_bytes``: all networks together, as the pipeline holds them. ``rss_bytes``: expected peak of the
    process on a CPU. ``job_bytes``: the journal's latents and photo; ``file_bytes``: the finished video, an
    estimate; ``disk_bytes``: free space the run needs (journal, part file and remuxed file at once).
    """

    preset: str
    size: str
    num_frames: int
    rows: tuple[Row, ...]
    weight_bytes: int
    activation_bytes: int
    rss_bytes: int
    job_bytes: int
    file_bytes: int
    calibrated: bool
    arrangement: Arrangement | None = None

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def disk_bytes(self) -> int:
        return self.job_bytes + 2 * self.file_bytes

    @property
    def seconds(self) -> float | None:
        known = [row.seconds for row in self.rows if row.seconds is not None]
        return sum(known) if known else None

    def row(self, phase: Phase) -> Row:
        return next(row for row in self.rows if row.phase == phase)

    def to_json(self) -> str:
        """One JSON object: the fields, the totals, and ``rows``."""
        totals = {"flops": self.flops, "disk_bytes": self.disk_bytes, "seconds": self.seconds}
        return json.dumps({**asdict(self), **totals})

    def lines(self) -> list[str]:
        """The plan as a plain text table."""
        head = ("phase", "windows", "tokens", "forwards", "FLOPs", "weights", "activations", "seconds")
        table = [head, *(cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        text = [line(row, widths) for row in table]
        text.append(f"total: {scaled(self.flops, 'FLOP')}")
        if self.seconds is None:
            together = self.weight_bytes + self.activation_bytes
            text.append(f"memory with everything on one device: {scaled(together, 'B')}")
        else:
            text.append(f"memory of the process: about {scaled(self.rss_bytes, 'B')}")
        text.append(
            f"disk: {scaled(self.disk_bytes, 'B')} while running, the file about {scaled(self.file_bytes, 'B')}"
        )
        if self.seconds is None:
            text.append("time: not known for this model here")
        else:
            basis = (
                "as measured by doctor" if self.calibrated else "by a reference machine; run doctor to measure yours"
            )
            text.append(f"time: about {duration(self.seconds)} ({basis})")
        return text + (self.arrangement.lines() if self.arrangement is not None else [])


def plan(
    request: Request,
    preset: Planned,
    calibration: Calibration | None = None,
    *,
    networks: Networks | None = None,
    overlap: bool = False,
) -> Plan:
    """The cost of ``request`` with ``preset``.

    ``calibration``: this machine's constants (``stored_calibration()``); a reference machine's if None.
    ``networks``: other networks than the preset's own. ``overlap``: the memory of stages that run at once; seconds are
    of one after another. Raises UsageError if a shipped configuration is not there.
    """
    if preset.family == "mobile":
        from .plan_mobile import planner_of

        return planner_of(request, preset, calibration or Calibration(), cast(Any, networks), overlap).plan()
    known = networks or costs.networks_of(preset.family, preset.folder, preset.prompt_tokens)
    return Planner(request, preset, known, calibration or Calibration(), overlap).plan()


@dataclass(frozen=True)
class Planner:
    """One request, priced phase by phase."""

    request: Request
    preset: Planned
    networks: Networks
    calibration: Calibration
    overlap: bool = False

    @property
    def nano(self) -> bool:
        return self.preset.family == "nano"

    @property
    def itemsize(self) -> int:
        return self.calibration.itemsize if self.nano else 2

    @property
    def clips(self) -> int:
        """How many clips the reference is: two where the photo's detail is carried along (``encode_pairs``)."""
        return 2 if self.preset.carries_detail else 1

    @property
    def blocks(self) -> int:
        return self.preset.grid.blocks(self.request.num_frames)

    @property
    def chunk_blocks(self) -> int:
        """Blocks decoded, and written, together."""
        return min(self.request.csg.segment_blocks, self.blocks - 1)

    @cached_property
    def motion_size(self) -> Size:
        return self.preset.grid.motion_size(self.request.size)

    @cached_property
    def positions(self) -> tuple[int, int]:
        """Latent positions of a block, of Stage I and Stage II."""
        grid = self.preset.grid
        return grid.stage_one.latent_size(self.motion_size).area, grid.stage_two.latent_size(self.request.size).area

    @cached_property
    def stage_one_windows(self) -> list[Window]:
        trained, overlap = self.preset.grid.trained_blocks, self.preset.overlap_blocks
        return list(
            motion_windows(self.blocks, trained_blocks=trained, overlap_blocks=overlap, generates_anchor=not self.nano)
        )

    @cached_property
    def stage_two_windows(self) -> list[Window]:
        csg = self.request.csg
        return list(windows(self.blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks))

    def rows(self) -> tuple[Row, ...]:
        return (
            self._text(),
            self._image(),
            self._motion(),
            self._motion_decode(),
            self._reference(),
            self._refine(),
            self._decode(),
            self._write(),
        )

    def plan(self) -> Plan:
        rows = self.rows()
        photo = self.request.size.area * FRAME_BYTES
        resident = sum(row.resident_bytes for row in rows)
        peak = photo + max(row.activation_bytes + resident - row.resident_bytes for row in rows)
        if self.overlap:
            peak = max(peak, photo + resident + self._at_once(rows))
        weights = self.networks.weight_bytes(self.itemsize)
        file_bytes = int(self.request.size.area * self.request.num_frames * FILE_BITS_PER_PIXEL / 8)
        return Plan(
            preset=self.preset.name,
            size=str(self.request.size),
            num_frames=self.request.num_frames,
            rows=rows,
            weight_bytes=weights,
            activation_bytes=peak,
            rss_bytes=self.calibration.rss_bytes + weights + peak + self._kept(),
            job_bytes=self._job_bytes(),
            file_bytes=file_bytes,
            calibrated=self.calibration.measured,
        )

    def _kept(self) -> int:
        """What the process keeps of the video encoder's freed frames while others work (glibc gives none back)."""
        return 0 if self.overlap else self.request.size.area * ENCODER_BYTES_PER_PIXEL

    def _at_once(self, rows: tuple[Row, ...]) -> int:
        """What overlapping lanes make at the same time; one that waits to hand its item on makes nothing."""
        own = {row.phase: max(row.activation_bytes - row.resident_bytes, 0) for row in rows}
        reference = max(own.get("motion decode", 0), own.get("reference", 0))
        return reference + own["refine"] + own["decode"] + own["write"]

    def _text(self) -> Row:
        prompts = 2 if max(self.request.guidance_scale, self.request.guidance_scale_2) > 1 else 1
        text = self.networks.text
        return Row(
            "text",
            tokens=text.tokens,
            forwards=prompts,
            flops=prompts * text.flops(),
            weight_bytes=text.parameters * self.itemsize,
            activation_bytes=text.activation_bytes(self.itemsize),
            seconds=self._seconds(prompts * text.flops()),
        )

    def _image(self) -> Row:
        """Frame 0 in Stage II's latents, Stage I's condition, and CLIP's view of the photo."""
        n, (small, large) = self.networks, self.positions
        flops = n.vae_2.encode_flops(large, 1) + n.vae.encode_flops(small, self.blocks)
        weights = n.vae.parameters + (n.image.parameters if n.image else 0)
        return Row(
            "image",
            forwards=self.blocks + 1,
            flops=flops + (n.image.flops() if n.image else 0),
            weight_bytes=weights * self.itemsize,
            activation_bytes=n.vae.encode_bytes(small, 1, self.itemsize),
            seconds=self._seconds(flops, self.request.size.area * FRAME_BYTES * (2 + 4 * self.blocks // 16)),
        )

    def _motion(self) -> Row:
        tokens = self.preset.grid.stage_one.tokens_per_block(self.motion_size)
        scale, steps = self.request.guidance_scale, self.request.num_inference_steps
        return self._denoising("motion", self.networks.stage_one, self.stage_one_windows, tokens, (steps, scale))

    def _refine(self) -> Row:
        tokens = self.preset.grid.stage_two.tokens_per_block(self.request.size)
        scale, steps = self.request.guidance_scale_2, self.request.num_inference_steps_2
        return self._denoising("refine", self.networks.stage_two, self.stage_two_windows, tokens, (steps, scale))

    def _denoising(
        self, phase: Phase, network: costs.DiTCost, cut: list[Window], tokens: int, steps_and_scale: tuple[int, float]
    ) -> Row:
        steps, scale = steps_and_scale
        passes = steps * (2 if scale > 1 else 1)
        if isinstance(network, costs.MobileDiTCost):
            network = replace(network, dense=self.nano and self.itemsize == 2)
        longest = max(len(window.blocks) for window in cut)
        flops = passes * sum(network.flops(len(window.blocks), tokens) for window in cut)
        latents = self._latent_bytes(phase, longest)
        total_tokens = tokens * passes * sum(len(window.blocks) for window in cut)
        traffic = total_tokens * network.layers * network.width * DIT_TRAFFIC * self.itemsize
        return Row(
            phase,
            tokens=longest * tokens,
            windows=len(cut),
            forwards=passes * len(cut),
            flops=flops,
            weight_bytes=network.parameters * self.itemsize,
            activation_bytes=network.activation_bytes(longest, tokens, self.itemsize) + latents,
            resident_bytes=latents,
            seconds=self._seconds(flops, traffic),
        )

    def _latent_bytes(self, phase: Phase, longest: int) -> int:
        """Float32 latents around a window: references in its buffer and gathered, what denoising starts from, the
        anchor (all views of ``clips`` clips); a segment before, now, in the decoder and scaled there, a neighbor."""
        if phase == "motion":
            return self.positions[0] * self.preset.grid.stage_one.channels * 4 * 2 * self.blocks
        csg = self.request.csg
        held = self.clips * (2 * longest + csg.segment_blocks + 1) + 4 * csg.segment_blocks + 1
        if self.request.encode == "ahead":
            held += self.clips * self.blocks
        return self.positions[1] * self.preset.grid.stage_two.channels * 4 * held

    def _motion_decode(self) -> Row:
        """Stage I's latents to pixels, three blocks at a time: those frames stay while Stage II consumes them."""
        n, small = self.networks, self.positions[0]
        held = min(self.blocks, 3)
        frames = self.preset.grid.temporal_stride * held * self.motion_size.area * FRAME_BYTES
        flops = n.vae.decode_flops(small, self.blocks)
        return Row(
            "motion decode",
            forwards=self.blocks,
            flops=flops,
            weight_bytes=n.vae.parameters * self.itemsize,
            activation_bytes=n.vae.decode_bytes(small, held, self.itemsize) + (0 if self.nano else 2 * frames),
            resident_bytes=frames + n.vae.decode_state(small, self.itemsize),
            seconds=self._seconds(flops, decoded=self.motion_size),
        )

    def _reference(self) -> Row:
        n, large = self.networks, self.positions[1]
        flops = self.clips * n.vae_2.encode_flops(large, self.blocks)
        pixels = self.clips * self.request.size.area * FRAME_BYTES
        trail = n.vae.decode_state(self.positions[0], self.itemsize) if self.preset.carries_detail else 0
        return Row(
            "reference",
            forwards=self.clips * self.blocks,
            flops=flops,
            weight_bytes=n.vae_2.parameters * self.itemsize,
            activation_bytes=self.clips * n.vae_2.encode_bytes(large, 1, self.itemsize) + trail,
            resident_bytes=n.vae_2.encode_state(large, self.itemsize) + trail,
            seconds=self._seconds(flops, 10 * pixels * self.request.num_frames),
        )

    def _decode(self) -> Row:
        n, large = self.networks, self.positions[1]
        flops = n.vae_2.decode_flops(large, self.blocks)
        return Row(
            "decode",
            forwards=self.blocks,
            flops=flops,
            weight_bytes=n.vae_2.parameters * self.itemsize,
            activation_bytes=n.vae_2.decode_bytes(large, self.chunk_blocks, self.itemsize),
            resident_bytes=n.vae_2.decode_state(large, self.itemsize),
            seconds=self._seconds(flops, decoded=self.request.size),
        )

    def _write(self) -> Row:
        area, chunk = self.request.size.area, self.chunk_blocks * self.preset.grid.temporal_stride
        return Row(
            "write",
            activation_bytes=area * (ENCODER_BYTES_PER_PIXEL + chunk * FRAME_BYTES),
            seconds=area * self.request.num_frames / self.calibration.encode_pixels if self.nano else None,
        )

    def _job_bytes(self) -> int:
        grid, (small, large) = self.preset.grid, self.positions
        motion = self.blocks * small * grid.stage_one.channels * 4
        segments = (self.blocks - 1) * large * grid.stage_two.channels * 4
        return motion + segments + 3 * self.request.size.area

    def _seconds(self, flops: float, traffic: float = 0, *, decoded: Size | None = None) -> float | None:
        """None for Wan: its GPU is not what doctor measured. ``decoded``: a decoder's frames, of this size."""
        rate = self.calibration.flops if decoded is None else self.calibration.conv_flops
        if decoded is not None:
            traffic = VAE_TRAFFIC * FRAME_BYTES * decoded.area * self.request.num_frames
        return flops / rate + traffic / self.calibration.copy_bytes if self.nano else None
