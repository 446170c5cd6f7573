"""How a clip is made in the memory there is: which parts are loaded when, what is streamed, how the VAE is cut.

A noun and its words; ``arranging`` finds one, ``residency`` carries it out. The numbers of the clip are the same in all
of them, but for the rounding of tiles in float32. Loads no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from .costs_tiles import DecodePlan, EncodePlan
from .profiles import GIB, Budget

PhaseName = Literal["text", "motion", "encode", "refine"]
When = Literal["lazy", "ahead"]


@dataclass(frozen=True)
class Need:
    """Bytes of one phase at its peak; ``host_bytes`` beside the device (on a CPU: 0, all of it is the device)."""

    phase: PhaseName
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Arrangement:
    """One way to make a clip.

    ``phased``: parts load and leave with their phase. ``streamed``: components whose weights pass the device layer by
    layer, from host memory or, ``from_disk``, the transformers from files. ``decode``, ``encode``: how Stage II's VAE
    is cut (None: nano's, which is not). ``overlap``: stages at once. ``extra_seconds``: a guess of what had to be given
    up. ``source``: of the budget that it fits.
    """

    phased: bool
    streamed: tuple[str, ...]
    from_disk: bool
    decode: DecodePlan | None
    encode: EncodePlan | None
    encode_when: When
    overlap: bool
    needs: tuple[Need, ...]
    extra_seconds: float
    source: str = ""

    @classmethod
    def from_json(cls, text: str) -> Arrangement:
        """What ``to_json`` wrote."""
        held = json.loads(text)
        for name, kind in (("decode", DecodePlan), ("encode", EncodePlan)):
            held[name] = None if held[name] is None else kind(**held[name])
        held["needs"] = tuple(Need(**need) for need in held["needs"])
        return cls(**{**held, "streamed": tuple(held["streamed"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def device_bytes(self) -> int:
        return max(need.device_bytes for need in self.needs)

    @property
    def host_bytes(self) -> int:
        return max(need.host_bytes for need in self.needs)

    def missing(self, budget: Budget) -> int:
        """Bytes by which it does not fit; 0 if it does."""
        device = max(self.device_bytes - budget.device_bytes, 0)
        return device + (0 if budget.on_cpu else max(self.host_bytes - budget.host_bytes, 0))

    def ways(self) -> list[str]:
        """What is done to fit, in words; nothing that is left as it is."""
        said = ["text, stage I and stage II load and leave one after another"] if self.phased else []
        if self.streamed:
            place = "their files" if self.from_disk else "host memory"
            said.append(f"streamed layer by layer from {place}: {', '.join(self.streamed)}")
        for name, cut in (("decoded", self.decode), ("encoded", self.encode)):
            if cut is not None and cut.tiles:
                parked = ", waiting caches in host memory" if cut.parked else ""
                cost = f"{100 * (cut.flops_factor - 1):.0f} % more arithmetic"
                said.append(f"{name} in {cut.rows}x{cut.columns} exact tiles, split {cut.split}{parked} ({cost})")
        if self.encode_when == "ahead":
            said.append("all of the reference is encoded before the first segment")
        return said + ([] if self.overlap else ["one stage at a time"]) or ["everything stays loaded"]

    def lines(self) -> list[str]:
        """``ways`` and each phase's need."""
        text = [f"to fit {self.source}:", *(f"  {way}" for way in self.ways())]
        for need in self.needs:
            host = f", {need.host_bytes / GIB:.1f} GiB of host memory" if need.host_bytes else ""
            text.append(f"  {need.phase}: {need.device_bytes / GIB:.1f} GiB{host}")
        return text
