"""The cheapest way to make a clip that fits a budget: every way priced by closed forms.

Never measured on a GPU: kernel workspaces and the allocator's slack are a share of the activations (``SLACK``), and
seconds are only there to choose by. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, product
from typing import Any, TypeVar

from .arrangement import Arrangement, Need, PhaseName, When
from .core import Size, UsageError
from .costs import WanVAECost
from .costs_tiles import DecodePlan, EncodePlan, Job, TilePlan, decode_plans, encode_plans
from .costs_wan_vae import shape_of
from .plan import FRAME_BYTES, Planner, Row
from .profiles import GIB, PROFILES, Budget

SLACK = 1.12
# To choose by: a card's rates of matrix products and of convolutions, of its way to the host and of a disk.
PRODUCTS, CONVOLUTIONS, LINK, DISK = 400e12, 200e12, 20e9, 2e9
IN_TURN_SECONDS, AHEAD_SECONDS, PHASED_SECONDS = 3.0, 2.0, 1.0
STREAMED_LAYERS = 3  # of a part that is streamed: the layer at work and those on their way
BASE_HOST = int(1.5 * GIB)  # the interpreter, its libraries, a chunk being written
STREAMABLE = {"text": "text_encoder", "stage_one": "transformer", "stage_two": "transformer_2"}


def arrange(planner: Planner, budget: Budget, *, layer_bytes: float | None = None, overlap: bool = True) -> Arrangement:
    """The cheapest way that fits ``budget``.

    ``layer_bytes``: of a weight of the transformers, if they are in 8 bits. ``overlap``: stages may run at once.
    Raises UsageError with the phase that does not fit and by how much, and the nearest size and card that would do.
    """
    pricing = Pricing(planner, budget.on_cpu, layer_bytes, overlap)
    found = pricing.cheapest(budget)
    if found is not None:
        return replace(found, source=budget.source)
    least = pricing.smallest(budget)
    worst = max(least.needs, key=lambda need: need.device_bytes - budget.device_bytes)
    reason = (
        f"{planner.request.size}, {planner.request.num_frames} frames do not fit ({budget.source}, "
        f"{budget.device_bytes / GIB:.1f} GiB for a run): {worst.phase} needs {worst.device_bytes / GIB:.1f} GiB"
    )
    reason += "" if budget.on_cpu else f" and {worst.host_bytes / GIB:.1f} GiB of host memory"
    raise UsageError(f"{reason} at least; {_nearest(planner, budget, layer_bytes)}")


def _nearest(planner: Planner, budget: Budget, layer_bytes: float | None) -> str:
    """The largest smaller size that fits, and the smallest card that this size fits."""

    def fits(candidate: Planner, within: Budget) -> bool:
        return Pricing(candidate, within.on_cpu, layer_bytes).cheapest(within) is not None

    request, grid, words = planner.request, planner.preset.grid, []
    for share in (0.75, 0.5, 0.25, 0.1, 0.05, 0.02):
        size = grid.size_for(int(request.size.area * share), request.size.aspect)
        if size.area < request.size.area and fits(_resized(planner, size), budget):
            words.append(f"{size} would fit")
            break
    cards = [] if budget.on_cpu else sorted(PROFILES.values(), key=lambda profile: profile.device_gib)
    card = next((card for card in cards if fits(planner, card.budget())), None)
    words += [] if card is None else [f"this size fits {card.name}"]
    if layer_bytes is not None and Pricing(planner, budget.on_cpu).cheapest(budget) is not None:
        words.append("it fits without --quantize, its layers streamed")
    return " and ".join(words) or "no smaller size fits either"


def _resized(planner: Planner, size: Size) -> Planner:
    request = planner.request.model_copy(update={"width": size.width, "height": size.height})
    return replace(planner, request=request)


@dataclass(frozen=True)
class Refining:
    """Stage II's phase: peaks of what its lanes make, and what each leaves (``..._held``) while others work."""

    motion: int
    motion_held: int
    encode: int
    encode_held: int
    refine: int
    refine_held: int
    decode: int
    decode_held: int
    chunk: int

    def peak(self, overlap: bool, encoding: bool) -> int:
        """Bytes at the peak; ``encoding``: whether the reference is still being encoded."""
        reference = max(self.motion - self.motion_held, self.encode - self.encode_held) if encoding else 0
        held = self.refine_held + self.decode_held
        held += self.motion_held + self.encode_held if encoding else 0
        refine, decode = self.refine - self.refine_held, self.decode - self.decode_held + self.chunk
        return held + (reference + refine + decode + self.chunk if overlap else max(reference, refine, decode))


Cut = TypeVar("Cut", bound=TilePlan)
Cuts = tuple[DecodePlan | None, EncodePlan | None]
Run = tuple[When, bool]  # when the reference is encoded, stages at once?
Loading = tuple[bool, tuple[str, ...], bool]  # by phase?, what is streamed, from files?


@dataclass(frozen=True)
class Pricing:
    """One request's phases, priced in every way."""

    planner: Planner
    on_cpu: bool
    layer_bytes: float | None = None
    overlap: bool = True
    smallest_part: int = GIB

    def cheapest(self, budget: Budget) -> Arrangement | None:
        """The way that fits and costs least; None if none fits."""
        best: Arrangement | None = None
        for run, loading in sorted(self._runs(), key=lambda way: self._seconds(*way)):
            if self._outgrown(run, loading, budget):
                continue
            for cut in self.cuts:
                seconds = self._seconds(run, loading) + _cut_seconds(cut, self.planner)
                if best is not None and seconds >= best.seconds:
                    break
                way = self._priced(run, cut, loading)
                if not way.missing(budget):
                    best = way
                    break
        return best

    def _outgrown(self, run: Run, loading: Loading, budget: Budget) -> bool:
        """Whether text or Stage I alone do not fit, however the VAE is cut."""
        needs = [need for need in self._priced(run, self.cuts[0], loading).needs if need.phase in ("text", "motion")]
        return any(n.device_bytes > budget.device_bytes or n.host_bytes > budget.host_bytes > 0 for n in needs)

    def smallest(self, budget: Budget) -> Arrangement:
        """The way that is nearest to fitting, with the VAE cut as small as it gets."""
        cut = min(self.cuts, key=lambda pair: sum(plan.device_bytes for plan in pair if plan is not None))
        return min((self._priced(run, cut, loading) for run, loading in self._runs()), key=lambda w: w.missing(budget))

    def _runs(self) -> Iterator[tuple[Run, Loading]]:
        orders = (True, False) if self.overlap else (False,)
        yield from product(product(self._whens(), orders), self._loadings())

    @cached_property
    def cuts(self) -> list[Cuts]:
        """Ways to cut the VAE, the cheapest first."""
        if not self.cuttable:
            return [(None, None)]
        return sorted(product(self.decodes, self.encodes), key=lambda cut: _cut_seconds(cut, self.planner))

    def _whens(self) -> tuple[When, ...]:
        """When the reference may be encoded: as asked, or ahead where that is not said (and there is a reference)."""
        if self.planner.preset.family == "mobile" or self.planner.request.encode == "ahead":
            return (self.planner.request.encode,)
        return ("lazy", "ahead")

    def _loadings(self) -> Iterator[Loading]:
        """Whether parts are loaded by phase, which are streamed, and whether from their files."""
        yield False, (), False
        if "motion" not in self.rows or sum(map(self.weights, STREAMABLE)) < self.smallest_part:
            return
        yield True, (), False
        counts = () if self.on_cpu else range(1, len(self.large) + 1)
        for streamed in chain.from_iterable(combinations(self.large, count) for count in counts):
            yield True, streamed, False
            if streamed != ("text",):
                yield True, streamed, True

    @cached_property
    def large(self) -> tuple[str, ...]:
        """Parts worth streaming; what is in 8 bits is not."""
        whole = STREAMABLE if self.layer_bytes is None else ("text",)
        return tuple(part for part in whole if self.weights(part) > self.smallest_part)

    # -- what is known of the request ---------------------------------------------------------------------------------

    @cached_property
    def rows_when(self) -> dict[When, dict[str, Row]]:
        """The plan's rows by phase, by when the reference is encoded."""
        found = {}
        for when in self._whens():
            request = self.planner.request.model_copy(update={"encode": when})
            found[when] = {str(row.phase): row for row in replace(self.planner, request=request).rows()}
        return found

    @cached_property
    def rows(self) -> dict[str, Row]:
        return next(iter(self.rows_when.values()))

    @property
    def cuttable(self) -> bool:
        return isinstance(self.planner.networks.vae_2, WanVAECost)

    def _job(self, blocks: int) -> Job:
        vae: Any = self.planner.networks.vae_2
        latent = self.planner.preset.grid.stage_two.latent_size(self.planner.request.size)
        return Job(shape_of(vae), latent.height, latent.width, blocks, self.planner.itemsize)

    @cached_property
    def decodes(self) -> list[DecodePlan]:
        return _front(decode_plans(self._job(self.planner.chunk_blocks), CONVOLUTIONS / LINK), parks=not self.on_cpu)

    @cached_property
    def encodes(self) -> list[EncodePlan]:
        return _front(encode_plans(self._job(1), CONVOLUTIONS / LINK), parks=not self.on_cpu)

    def weights(self, part: str) -> int:
        """Bytes of a part's weights; 0 if the preset has none."""
        network = getattr(self.planner.networks, part, None)
        if network is None:
            return 0
        in_8_bits = part in ("stage_one", "stage_two") and self.layer_bytes is not None
        return int(network.parameters * (self.layer_bytes if in_8_bits and self.layer_bytes else self.planner.itemsize))

    def held(self, part: str, streamed: tuple[str, ...]) -> int:
        """Weights of a part that are on the device while it works."""
        whole = self.weights(part)
        layers = getattr(getattr(self.planner.networks, part, None), "layers", STREAMED_LAYERS)
        return STREAMED_LAYERS * whole // layers if part in streamed else whole

    @cached_property
    def vaes(self) -> int:
        networks: Any = self.planner.networks
        first = getattr(networks, "vae", networks.vae_2)
        return self.weights("vae_2") + (0 if first == networks.vae_2 else self.weights("vae"))

    def refining(self, cut: Cuts, when: When) -> Refining:
        """What Stage II's lanes need when its VAE is cut like this."""
        rows, (decode, encode) = self.rows_when[when], cut
        nothing = Row("reference")
        motion, reference = rows.get("motion decode", nothing), encode or rows.get("reference", nothing)
        frames = self.planner.chunk_blocks * self.planner.preset.grid.temporal_stride
        return Refining(
            *_bytes(motion),
            *_bytes(reference),
            *_bytes(rows["refine"]),
            *_bytes(decode or rows["decode"]),
            frames * self.planner.request.size.area * FRAME_BYTES,
        )

    # -- one way ------------------------------------------------------------------------------------------------------

    def _priced(self, run: Run, cut: Cuts, loading: Loading) -> Arrangement:
        (when, overlap), (phased, streamed, from_disk), needs = run, loading, []
        refining = self.refining(cut, when)
        parked = sum(plan.host_bytes for plan in cut if plan is not None)
        for phase, parts, activations in self._phases(refining, when, overlap):
            loaded = parts if phased else (*STREAMABLE, "image")
            weights = self.vaes + sum(self.held(part, streamed) for part in loaded)
            kept = [part for part in parts if part in streamed and not (from_disk and part != "text")]
            host = sum(self.weights(part) for part in kept)
            host += BASE_HOST + refining.chunk + (parked if phase in ("encode", "refine") else 0)
            needs.append(Need(phase, self._device(weights, activations), 0 if self.on_cpu else host))
        names = tuple(STREAMABLE[part] for part in streamed)
        seconds = self._seconds(run, loading) + _cut_seconds(cut, self.planner)
        return Arrangement(phased, names, from_disk, *cut, when, overlap, tuple(needs), seconds)

    def _phases(
        self, refining: Refining, when: When, overlap: bool
    ) -> Iterator[tuple[PhaseName, tuple[str, ...], int]]:
        rows = self.rows
        if "text" in rows:
            image = self.planner.networks.image
            clip = image.activation_bytes(self.planner.itemsize) if image else 0
            yield "text", ("text", "image"), max(rows["text"].activation_bytes, clip)
        if "motion" in rows:
            yield "motion", ("stage_one",), max(rows["motion"].activation_bytes, rows["image"].activation_bytes)
        if when == "ahead":
            before = refining.motion_held + max(refining.motion - refining.motion_held, refining.encode)
            yield "encode", (), before + refining.refine_held
        yield "refine", ("stage_two",), refining.peak(overlap, encoding=when == "lazy")

    def _device(self, weights: int, activations: int) -> int:
        photo = self.planner.request.size.area * FRAME_BYTES
        if not self.on_cpu:
            return int(weights + SLACK * (activations + photo))
        # The process and the encoder of the file, which on a card are the host's.
        return int(
            self.planner.calibration.rss_bytes + weights + activations + photo + self.rows["write"].activation_bytes
        )

    def _seconds(self, run: Run, loading: Loading) -> float:
        """What this order of work and these loadings cost, the VAE aside."""
        (when, overlap), (phased, streamed, from_disk) = run, loading
        seconds = (0 if overlap else IN_TURN_SECONDS) + (AHEAD_SECONDS if when == "ahead" else 0)
        seconds += PHASED_SECONDS if phased else 0
        for part in streamed:
            row = self.rows[{"text": "text", "stage_one": "motion", "stage_two": "refine"}[part]]
            moved = self.weights(part) / (DISK if from_disk and part != "text" else LINK)
            # The next layer travels while one works.
            seconds += row.forwards * max(moved - row.flops / row.forwards / PRODUCTS, 0) + moved
        return seconds


def _cut_seconds(cut: Cuts, planner: Planner) -> float:
    """What tiles cost over none: arithmetic on their margins, and caches that go to the host and back."""
    seconds = 0.0
    for plan, blocks in zip(cut, (planner.chunk_blocks, 1), strict=True):
        if plan is not None:
            extra = plan.flops * (1 - 1 / plan.flops_factor)
            seconds += planner.blocks / blocks * (extra / CONVOLUTIONS + plan.traffic_bytes / LINK)
    return seconds


def _bytes(what: Row | TilePlan) -> tuple[int, int]:
    """The peak, and what of it stays."""
    if isinstance(what, TilePlan):
        return what.device_bytes, what.resident_bytes
    return what.activation_bytes, what.resident_bytes


def _front(plans: Sequence[Cut], *, parks: bool) -> list[Cut]:
    """Of plans, the cheapest first, those that need less of something than every cheaper one."""
    kept: list[Cut] = []
    for plan in plans:
        if plan.parked and not parks:
            continue
        if not any(_no_more(other, plan) for other in kept):
            kept.append(plan)
    return kept


def _no_more(one: TilePlan, other: TilePlan) -> bool:
    return (
        one.device_bytes <= other.device_bytes
        and one.resident_bytes <= other.resident_bytes
        and one.host_bytes <= other.host_bytes
    )
