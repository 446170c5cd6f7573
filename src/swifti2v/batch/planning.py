"""From a jobs file and what its state says to the clips that are to be made: every line checked, all errors at once.

Nothing loads and nothing is made here but the state's own records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import media, order, presets
from ..core import Request, UsageError
from ..journal import MANIFEST
from .jobs import Errors, Line, read_lines, twice
from .state import Record, State
from .words import Clip


@dataclass(frozen=True)
class Batch:
    """``clips`` to make, in the file's order; ``there``: lines whose videos are; ``notices``: what else to say."""

    clips: tuple[Clip, ...]
    there: tuple[int, ...]
    notices: tuple[str, ...]


def plan_batch(file: Path, state: State, model: str | None) -> Batch:
    """What is to be made of a jobs file; its new lines are written down. Raises UsageError naming every bad line."""
    errors = Errors(file.name)
    clips: list[Clip] = []
    there: list[int] = []
    notices: list[str] = []
    lines = read_lines(file, model, errors)
    for line in lines:
        try:
            clip, told = _new(line, file) if line.number not in state.planned else (_old(line, state), ())
        except UsageError as error:
            errors.add(line.number, error)
            continue
        notices += [f"line {line.number}: {text}" for text in told]
        if state.is_made(line.number):
            there.append(line.number)
        clips.append(clip)
    for number, reason in twice((clip.line, clip.target) for clip in clips):
        errors.add(number, reason)
    errors.refuse()
    for line, clip in zip(lines, clips, strict=True):
        if line.number not in state.planned:
            output = state.name_of(clip.target)
            state.append(Record(what="planned", line=line.number, output=output, said=line.said, request=clip.request))
    gone = sorted(state.planned.keys() - {line.number for line in lines})
    notices += [f"line {number} is no longer in {file.name}; what was made of it is left alone" for number in gone]
    return Batch(tuple(clip for clip in clips if clip.line not in there), tuple(there), tuple(notices))


def _new(line: Line, file: Path) -> tuple[Clip, tuple[str, ...]]:
    """A line seen for the first time: checked as ``generate`` would, under names that are free."""
    said = line.options.output
    options = dataclasses.replace(line.options, output=said or str(file.absolute().parent))
    checked = order.prepare(options)
    request, target = checked.manifest.request, checked.wanted
    if said is None or os.path.isdir(said):
        stem = Path(options.image or "").stem
        target = target.with_name(f"{stem}_{line.number:04d}_{request.seed}_{request.size}_{request.num_frames}f.mp4")
    clip = _clip(line, request, target)
    _check_free(clip)
    return clip, checked.notices


def _old(line: Line, state: State) -> Clip:
    """A line that the state knows: the same as it was, or refused."""
    planned = state.planned[line.number]
    if planned.request is None or planned.said is None:
        raise UsageError(f"{state.folder.name}/ does not say what it was; remove that folder to plan anew")
    changes = list(_differences(planned.said, line.said))
    clip = _clip(line, planned.request, state.path_of(planned))
    if not changes and not state.is_made(line.number):
        if (clip.folder / MANIFEST).is_file():
            # What the job began with is compared when it is resumed; its photo lies in it.
            order.check_weights(presets.get(planned.request.preset), order.location(clip.options.model))
        else:
            request = order.prepare(clip.options).manifest.request
            # When the reference is encoded may depend on the memory of the day, and changes nothing.
            now = request.model_copy(update={"encode": planned.request.encode})
            changes = list(_differences(planned.request.model_dump(), now.model_dump()))
        if not state.attempts.get(line.number):
            _check_free(clip)
    if changes:
        raise UsageError(
            f"is not what it was when it was planned: {'; '.join(changes)}. Put it back, or append it as a new line"
        )
    return clip


def _clip(line: Line, request: Request, target: Path) -> Clip:
    options = dataclasses.replace(line.options, seed=request.seed, output=str(target))
    staged = presets.get(request.preset).stages == 2 and options.motion is None
    return Clip(line.number, options, request, target, staged)


def _check_free(clip: Clip) -> None:
    """UsageError if something lies under a name that the clip needs: it is not this batch's."""
    for path in (clip.target, clip.folder, media.part_path(clip.target)):
        if os.path.lexists(path):
            raise UsageError(f"{path} exists and is not this batch's; remove it or choose another output")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            old, new = (repr(values[key])[:80] if key in values else "absent" for values in (then, now))
            yield f"{key} was {old}, is {new}"
