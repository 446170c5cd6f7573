"""Profiles: how much memory there is to make a clip in, by the name of a card or by what is free.

A profile changes where weights and caches are and when, never the numbers: weights in 8 bits are a wish of its own
(``--quantize``), which ``arrangement`` then counts with. Knows sizes; loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .core import UsageError

GIB = 2**30
UNKNOWN = 2**62  # host memory where nobody can say how much there is: as much as it takes
# What a CUDA context, its libraries and a screen take of a card before the first tensor is there.
CARD_RESERVE = GIB
# Of a machine's free memory, what is left to others.
HOST_RESERVE = GIB // 2


@dataclass(frozen=True)
class Budget:
    """Memory that a run may take. ``device_bytes``: tensors on the accelerator; on a CPU the process.
    ``host_bytes``: beside it in host memory (on a CPU: none). ``source``: where the figures come from."""

    device_bytes: int
    host_bytes: int
    source: str
    on_cpu: bool = False

    def words(self) -> str:
        """What a run may take."""
        host = "" if self.on_cpu or self.host_bytes >= UNKNOWN else f" and {self.host_bytes / GIB:.0f} in host memory"
        return f"{self.device_bytes / GIB:.1f} GiB{host} for a run"


@dataclass(frozen=True)
class Profile:
    """A card of ``device_gib`` in a machine of about ``host_gib``, both by their labels."""

    name: str
    device_gib: int
    host_gib: int

    def budget(self) -> Budget:
        """What the card leaves to a run; cards hold a little less than their label says."""
        device = int(self.device_gib * 0.98 * GIB) - CARD_RESERVE
        return Budget(device, self.host_gib * GIB, f"profile {self.name}")


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("80gb", 80, 128),
        Profile("24gb", 24, 64),
        Profile("16gb", 16, 64),
        Profile("12gb", 12, 48),
        Profile("8gb", 8, 48),
    )
}
NAMES = ("auto", *PROFILES, "cpu")


def budget_of(name: str, free_device: int | None, free_host: int | None) -> Budget:
    """The memory that a profile stands for.

    ``free_device``: free bytes of the accelerator a run would use, None if there is none (then it is the CPU's).
    ``free_host``: free bytes of host memory, None where not known. "auto" takes what is free; a card's name takes
    the card, whatever is here; "cpu" this machine's memory. Raises UsageError for an unknown name.
    """
    if name not in NAMES:
        raise UsageError(f"profile {name!r} is not known; use {', '.join(NAMES)}")
    if name in PROFILES:
        return PROFILES[name].budget()
    if name == "cpu" or free_device is None:
        if free_host is None:
            raise UsageError(f"profile {name}: free memory is not known on this system; leave --profile out")
        return Budget(free_host - HOST_RESERVE, 0, f"{free_host / GIB:.1f} GiB free in this machine", on_cpu=True)
    host = free_host - HOST_RESERVE if free_host is not None else UNKNOWN
    return Budget(free_device - CARD_RESERVE // 2, host, f"{free_device / GIB:.1f} GiB free on the accelerator")
