"""What a pipeline does around its networks: the call's arguments, the windows, segments kept in a job, events.

Shared by ``pipeline`` and ``mobile``. It knows no network and no stage but the segment loop.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from . import presets
from .core import Chunk, Event, Request
from .images import read_image
from .overlap import Running, Stopped
from .reference import fit_image
from .segments import Window, windows
from .stage_two import Sampling, Velocity, refine

Emit = Callable[[Event], None]
Method = TypeVar("Method", bound=Callable[..., Any])


class Journal(Protocol):
    """What a run needs of a job: the latents it already holds, and a place for new ones (``journal.Job``)."""

    def motion(self) -> list[Tensor]: ...
    def save_motion(self, number: int, latents: Tensor, blocks: Sequence[int]) -> None: ...
    def stream(self, kind: Any) -> Iterator[Tensor]: ...
    def save_segment(self, number: int, latents: Tensor, blocks: Sequence[int]) -> None: ...


def without_gradients(generate: Method) -> Method:
    """``torch.no_grad`` for a method that generates large things: torch's own holds the last while the next is made."""

    @functools.wraps(generate)
    def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(generate(*args, **kwargs)) as things:
            while True:
                with torch.no_grad():
                    thing = next(things, None)
                if thing is None:
                    return
                yield thing
                del thing

    return cast(Method, generator)


def check_photo(photo: Tensor, request: Request) -> None:
    """ValueError unless ``photo`` is (1, 3, 1, H, W) of the request's size."""
    expected = (1, 3, 1, request.height, request.width)
    if tuple(photo.shape) != expected:
        raise ValueError(f"photo has shape {tuple(photo.shape)}, the request needs {expected}; use fit_image")


def segment_windows(preset: presets.Preset, request: Request) -> list[Window]:
    """The windows in which a clip's segments are made."""
    blocks, csg = preset.grid.blocks(request.num_frames), request.csg
    return list(windows(blocks, segment_blocks=csg.segment_blocks, neighbor_blocks=csg.neighbor_blocks))


def saved_segments(
    velocity: Velocity,
    reference: Iterable[Tensor],
    plan: Sequence[Window],
    sampling: Sampling,
    job: Journal | None,
    report: Reporter,
    channels: int | None = None,
) -> Iterator[Tensor]:
    """``refine``'s segments, those that ``job`` holds first; every new one is saved before it is handed on."""
    steps, held = len(sampling.levels) - 1, 0

    def finished() -> Iterator[Tensor]:
        nonlocal held
        for segment in job.stream("segments") if job is not None else ():
            held += 1
            yield segment

    def on_step(number: int, step: int) -> None:
        report("progress", "refine", segment=number + 1, step=number * steps + step, total=len(plan) * steps)

    segments = refine(velocity, reference, plan, sampling, channels=channels, finished=finished(), on_step=on_step)
    for number, segment in enumerate(segments):
        if job is not None and number >= held:
            job.save_segment(number, segment, plan[number].segment)
        report("segment", "refine", segment=number + 1, step=(number + 1) * steps, total=len(plan) * steps)
        yield segment


def chunks(decoded: Iterator[Tensor], photo: Tensor, request: Request, total: int, report: Reporter) -> Iterator[Chunk]:
    """A run's pixels as its chunks, told when it starts and when it is done; ``total``: its segments."""
    report("started", "run", total=total, message=f"{request.num_frames} frames of {request.size}")
    start = number = 0
    for pixels in decoded:  # not enumerate, which keeps the last while making the next
        if number == 0 and request.exact_first_frame:
            pixels = photo
        yield Chunk(pixels, start, number, total)
        start, number = start + pixels.shape[2], number + 1
        del pixels
    report("completed", "run", total, total, total)


def asked(
    preset: presets.Preset, image: Any, generator: torch.Generator | None, **fields: Any
) -> tuple[Tensor, Request]:
    """The fitted photo and the request of a call under diffusers' argument names; UsageError for what cannot be made.

    ``fields``: ``height``, ``width``, ``seed`` (drawn from ``generator`` if None) and what ``presets.resolve`` takes.
    """
    source = read_image(image)
    height, width, seed = (fields.pop(name) for name in ("height", "width", "seed"))
    if seed is None and generator is not None:
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    size = None if height is None or width is None else f"{width}x{height}"
    facts: dict[str, Any] = {"photo_size": source.size, "image_sha256": source.sha256, "size": size, "seed": seed}
    request, _ = presets.resolve(preset, **facts, **fields)
    return fit_image(source.pixels, request.size, request.fit), request


def gathered(pipeline: Any, photo: Tensor, request: Request, on_step_end: Callable[..., Any] | None) -> Tensor:
    """All of ``pipeline.stream``, (1, 3, t, H, W), under diffusers' progress bar and step callback."""
    with pipeline.progress_bar(total=1) as bar:

        def follow(event: Event) -> None:
            if event.type == "progress" and event.phase in ("motion", "refine"):
                if bar.total != event.total:
                    bar.reset(event.total)
                bar.update()
                if on_step_end is not None:
                    on_step_end(pipeline, event.step, event.total, {})

        return torch.cat([chunk.frames.cpu() for chunk in pipeline.stream(photo, request, emit=follow)], dim=2)


class Reporter:
    """Turns what happens into ``Event``s with the seconds since the run began, one at a time whatever thread it is in.

    Where the run has ended already, ``Stopped`` is raised instead: so its stages end between two steps.
    """

    def __init__(self, emit: Emit | None, running: Running | None = None) -> None:
        self._emit, self._running, self._begin = emit, running, time.monotonic()
        self._one_at_a_time = threading.Lock()

    def span(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Tells the run's trace, if there is one, that what happens inside bears ``name``."""
        return contextlib.nullcontext() if self._running is None else self._running.span(name)

    def __call__(
        self, type: Any, phase: str, segment: int = 0, step: int = 0, total: int = 0, message: str = ""
    ) -> None:
        if self._running is not None and self._running.stopped():
            raise Stopped(f"{phase}: the run has ended")
        if self._emit is not None:
            with self._one_at_a_time:
                self._emit(Event(type, phase, segment, step, total, time.monotonic() - self._begin, message))
