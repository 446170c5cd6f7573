"""Camera motions and the sentences that ask for them: one vocabulary for writing and for reading back.

A prompt names at most two motions and one speed. "Pan left" turns the camera left, so that the
picture moves right; "roll clockwise" turns the camera clockwise, so that the picture turns the other way.
A prompt without any motion word means a slow zoom in. This module knows no tensors.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from ..camera import FAST_PAN, FAST_ROLL, FAST_SHAKE, FAST_ZOOM, Motion

SPEEDS = ("slow", "", "fast")
# Slow, plain and fast, a third, two thirds and the whole of the camera's fast speed.
PAN, ROLL, SHAKE = (tuple(fast * part / 3 for part in (1, 2, 3)) for fast in (FAST_PAN, FAST_ROLL, FAST_SHAKE))
ZOOM = tuple(FAST_ZOOM ** (part / 3) for part in (1, 2, 3))


@dataclass(frozen=True)
class Caption:
    """A prompt and the motion it asks for."""

    prompt: str
    motion: Motion


_MOVES = ("left", "right", "up", "down", "in", "out", "clockwise", "counterclockwise", "shake")
_AXES = {
    "left": 0,
    "right": 0,
    "up": 1,
    "down": 1,
    "in": 2,
    "out": 2,
    "clockwise": 3,
    "counterclockwise": 3,
    "shake": 4,
}
_VERBS: dict[str, tuple[str, ...]] = {
    "left": ("pan left", "turn left", "move left", "pan to the left", "move to the left"),
    "right": ("pan right", "turn right", "move right", "pan to the right", "move to the right"),
    "up": ("tilt up", "pan up", "move up", "look up", "tilt upwards"),
    "down": ("tilt down", "pan down", "move down", "look down", "tilt downwards"),
    "in": ("zoom in", "push in", "dolly in", "move closer", "move forward"),
    "out": ("zoom out", "pull out", "pull back", "dolly out", "move backward"),
    "clockwise": ("roll clockwise", "rotate clockwise", "turn clockwise"),
    "counterclockwise": ("roll counterclockwise", "rotate counterclockwise", "roll counter-clockwise"),
    "shake": ("shake",),
}
_NOUNS = {"shake": ("handheld shake", "handheld camera", "shaky camera", "camera shake")}
_STATIC = ("static shot", "static camera", "still camera", "locked-off shot", "the camera does not move", "no motion")
_ADVERBS = {"slow": ("slowly", "gently"), "fast": ("quickly", "fast")}
_ADJECTIVES = {"slow": ("slow", "gentle"), "fast": ("fast", "quick")}

_ANY = r"(?:pan|turn|mov|tilt|look|zoom|push|pull|doll|roll|rotat|track|truck|slid|sweep|driv)\w*"
_PATTERNS = {
    "left": rf"\b{_ANY} left(?:wards?)?\b|\bleft pan\b",
    "right": rf"\b{_ANY} right(?:wards?)?\b|\bright pan\b",
    "up": rf"\b{_ANY} up(?:wards?)?\b",
    "down": rf"\b{_ANY} down(?:wards?)?\b",
    "in": rf"\b{_ANY} (?:in|closer|forwards?)\b",
    "out": rf"\b{_ANY} (?:out|back|backwards?|away)\b",
    "clockwise": rf"\b{_ANY} clockwise\b",
    "counterclockwise": rf"\b{_ANY} (?:counter|anti)-?clockwise\b",
    "shake": r"\bshak\w*|\bhand-?held\b",
}
_STATIC_PATTERN = r"\b(?:static|locked-off|motionless|no (?:camera )?motion|does not move|still (?:camera|shot))\b"
_SLOW_PATTERN = r"\b(?:slow|slowly|gentle|gently)\b"
_FAST_PATTERN = r"\b(?:fast|quick|quickly|rapid|rapidly)\b"

_ADJECTIVE_WORDS = re.findall(
    r"\w+",
    "misty golden quiet old wooden green rocky snowy wild bright dark colorful tiny huge red blue "
    "empty ancient sunny rainy foggy lonely modern rusty purple white stormy warm cold soft",
)
_NOUN_WORDS = re.findall(
    r"\w+",
    "lake mountain forest street bridge castle flower river valley beach desert city harbor boat cat "
    "dog bird field garden waterfall cliff sky sunset night tree leaf house temple tower train woman "
    "man child road island glacier ocean canyon market window cloud moon meadow dune lighthouse",
)
_LETTERS = ("bcdfglmnprstv", "aeiou")


def speed_index(text: str) -> int:
    """0, 1 or 2: slow, unnamed, fast."""
    if re.search(_SLOW_PATTERN, text):
        return 0
    return 2 if re.search(_FAST_PATTERN, text) else 1


def motion_of(moves: tuple[str, ...], speed: int) -> Motion:
    """The motion of named moves (``left right up down in out clockwise counterclockwise shake``) at a speed 0-2."""
    motion = Motion()
    for move in moves:
        sign = 1 if move in ("right", "up", "in", "clockwise", "shake") else -1
        change: dict[str, float] = [
            {"pan": sign * PAN[speed]},
            {"tilt": sign * PAN[speed]},
            {"zoom": ZOOM[speed] ** sign},
            {"roll": sign * ROLL[speed]},
            {"shake": SHAKE[speed]},
        ][_AXES[move]]
        motion = replace(motion, **change)
    return motion


def parse(prompt: str) -> Motion:
    """The motion a prompt asks for; no motion word at all: a slow zoom in."""
    text = prompt.lower()
    speed = speed_index(text)
    bare = re.sub(rf"{_SLOW_PATTERN}|{_FAST_PATTERN}", " ", text)
    bare = " ".join(re.sub(r"\bto the\b", " ", bare).split())
    moves = tuple(move for move in _MOVES if re.search(_PATTERNS[move], bare))
    if moves:
        return motion_of(moves, speed)
    return Motion() if re.search(_STATIC_PATTERN, bare) else motion_of(("in",), 0)


def caption(rng: random.Random) -> Caption:
    """A random prompt with its motion: 8% static, 8% without motion words, the rest one or two moves."""
    kind = rng.random()
    if kind < 0.08:
        phrase, motion = rng.choice(_STATIC), Motion()
    elif kind < 0.16:
        phrase, motion = "", motion_of(("in",), 0)
    else:
        moves = _pick_moves(rng)
        speed = rng.randrange(3)
        phrase, motion = _phrase(rng, moves, SPEEDS[speed]), motion_of(moves, speed)
    return Caption(_dress(rng, phrase), motion)


def _pick_moves(rng: random.Random) -> tuple[str, ...]:
    first = rng.choice(_MOVES)
    others = [move for move in _MOVES if _AXES[move] != _AXES[first]]
    return (first, rng.choice(others)) if rng.random() < 0.3 else (first,)


def _phrase(rng: random.Random, moves: tuple[str, ...], speed: str) -> str:
    parts = []
    for index, move in enumerate(moves):
        if move in _NOUNS:
            words = rng.choice(_NOUNS[move])
            parts.append(f"{rng.choice(_ADJECTIVES[speed])} {words}" if speed and index == 0 else words)
        else:
            parts.append(_verb_phrase(rng, rng.choice(_VERBS[move]), speed if index == 0 else ""))
    return rng.choice((" and ", ", ", " with ")).join(parts)


def _verb_phrase(rng: random.Random, words: str, speed: str) -> str:
    verb, rest = words.split(" ", 1)
    third = {"dolly": "dollies", "push": "pushes"}.get(verb, verb + "s")
    gerund = {"move": "moving", "rotate": "rotating"}.get(verb, verb + "ing")
    if not speed:
        return rng.choice((words, f"the camera {third} {rest}", f"camera {third} {rest}", f"{gerund} {rest}"))
    adjective, adverb = rng.choice(_ADJECTIVES[speed]), rng.choice(_ADVERBS[speed])
    return rng.choice(
        (
            f"{adjective} {words}",
            f"{words} {adverb}",
            f"the camera {third} {rest} {adverb}",
            f"the camera {third} {adverb} {rest}",
            f"{adverb} {gerund} {rest}",
            f"a {adjective} {words}",
        )
    )


def _dress(rng: random.Random, phrase: str) -> str:
    """Words around the motion: nothing, or a subject before or after; sometimes made-up words and capitals."""
    if phrase and rng.random() < 0.4:
        text = phrase
    else:
        subject = f"{rng.choice(('a', 'the', 'an image of a', 'photo of a'))} {_adjective(rng)} {_noun(rng)}"
        if rng.random() < 0.5:
            subject += f" {rng.choice(('at', 'near', 'under', 'with', 'by', 'behind'))} the {_noun(rng)}"
        both = rng.choice((f"{phrase}, {subject}", f"{subject}, {phrase}", f"{subject}. {phrase}"))
        text = both if phrase else subject
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def _adjective(rng: random.Random) -> str:
    return rng.choice(_ADJECTIVE_WORDS) if rng.random() < 0.8 else _made_up(rng)


def _noun(rng: random.Random) -> str:
    return rng.choice(_NOUN_WORDS) if rng.random() < 0.8 else _made_up(rng)


def _made_up(rng: random.Random) -> str:
    """A pronounceable non-word, so that unknown words learn to be ignored."""
    return "".join(rng.choice(_LETTERS[0]) + rng.choice(_LETTERS[1]) for _ in range(rng.randint(2, 4)))
