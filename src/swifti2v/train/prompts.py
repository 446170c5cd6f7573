"""Camera motions and the sentences that ask for them: one vocabulary for writing and for reading back.

A prompt names at most two motions and one speed. "Pan left" turns the camera left, so that the
picture moves right; "roll clockwise" turns the camera clockwise, so that the picture turns the other way.
A prompt without any motion word means a slow zoom in; one that says that the camera stays still means no motion.
What people and things in the picture do ("a bird flies left") is no camera motion. This module knows no tensors.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..camera import FAST_PAN, FAST_ROLL, FAST_SHAKE, FAST_ZOOM, Motion
from . import prompt_words as words

SPEEDS = ("slow", "", "fast")
# Slow, plain and fast, a third, two thirds and the whole of the camera's fast speed.
PAN, ROLL, SHAKE = (tuple(fast * part / 3 for part in (1, 2, 3)) for fast in (FAST_PAN, FAST_ROLL, FAST_SHAKE))
ZOOM = tuple(FAST_ZOOM ** (part / 3) for part in (1, 2, 3))
MAX_BYTES = 127  # nano reads 128 tokens: bytes and an end


@dataclass(frozen=True)
class Caption:
    """A prompt and the motion it asks for."""

    prompt: str
    motion: Motion


_AXES = {"left": 0, "right": 0, "up": 1, "down": 1, "in": 2, "out": 2, "clockwise": 3, "counterclockwise": 3}
_AXES["shake"] = 4
_MOVES = tuple(_AXES)


def motion_of(moves: Sequence[str], speed: int) -> Motion:
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


def caption(rng: random.Random, typos: float = 0.0) -> Caption:
    """A random prompt with its motion: 11% static, 24% without motion words, the rest one or two moves.

    The motion lies within the first ``MAX_BYTES`` bytes. ``typos``: the share of prompts with slips of the keyboard;
    without them ``parse`` reads the motion back.
    """
    kind = rng.random()
    if kind < 0.11:
        phrase, motion = rng.choice(words.STATIC), Motion()
    elif kind < 0.35:
        phrase, motion = "", motion_of(("in",), 0)
    else:
        moves = _pick_moves(rng)
        speed = rng.randrange(3)
        phrase, motion = _phrase(rng, moves, SPEEDS[speed]), motion_of(moves, speed)
    text = _cased(rng, _dress(rng, phrase))
    return Caption(_mistyped(rng, text) if rng.random() < typos else text, motion)


def _pick_moves(rng: random.Random) -> tuple[str, ...]:
    first = rng.choice(_MOVES)
    others = [move for move in _MOVES if _AXES[move] != _AXES[first]]
    return (first, rng.choice(others)) if rng.random() < 0.3 else (first,)


def _phrase(rng: random.Random, moves: Sequence[str], speed: str) -> str:
    """The words that ask for the moves, all in one grammatical form."""
    form = rng.choice(("bare", "third", "third", "gerund", "noun", "noun", "order"))
    joint = rng.choice(words.NOUN_LINKS if form == "noun" else words.VERB_LINKS)
    first, *rest = moves
    text = _part(rng, first, form, speed)
    text += "" if rest or ", " in text else _tail(rng, first)
    for move in rest:
        form = "gerund" if joint == "while" else "bare" if form == "order" else form
        if move == "shake" and rng.random() < 0.7:
            form, joint = "noun", rng.choice((",", "with"))
        second = _verb_part(rng, move, form, "") if form in ("third", "gerund") else _part(rng, move, form, "", False)
        text += ("" if joint[0] == "," else " ") + f"{joint} {second}" + _tail(rng, move)
    return text


def _part(rng: random.Random, move: str, form: str, speed: str, first: bool = True) -> str:
    """One move as a phrase of its own, with the speed in it."""
    if form == "noun" or (move == "shake" and rng.random() < 0.6):
        text = _noun(rng, move)
        if speed or rng.random() < 0.08:
            late = rng.random() < 0.15
            word = rng.choice((words.ADVERBS if late else words.ADJECTIVES)[speed])
            text = f"{text}, {word}" if late else f"{word} {text}"
        article = "an" if text[0] in "aeiou" else "a"
        return f"{article} {text}" if rng.random() < 0.35 and not text.startswith("hand") else text
    verb = _verb_part(rng, move, form, speed)
    start = rng.choice([item for item in words.STARTS[form] if speed == "slow" or "slowly" not in item])
    if form == "order" and not speed and " " in verb and rng.random() < 0.5:
        return verb.replace(" ", " the camera ", 1)
    return (start.strip() + " " + verb).strip() if first else verb


def _verb_part(rng: random.Random, move: str, form: str, speed: str) -> str:
    verb, _, rest = _direction_words(rng, move).partition(" ")
    if form in ("third", "gerund"):
        verb = (_third if form == "third" else _gerund)(verb)
    if not speed and rng.random() > 0.08:
        return f"{verb} {rest}".strip()
    adverb = rng.choice(words.ADVERBS[speed])
    place = 2 if adverb.startswith("at ") else rng.randrange(3)
    return " ".join(part for part in (*(verb, rest)[:place], adverb, *(verb, rest)[place:]) if part)


def _direction_words(rng: random.Random, move: str) -> str:
    """A verb phrase in the infinitive."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}.get(move, "")
    if move in words.ROLL_ENDS:
        return f"{rng.choice(words.ROLL_VERBS)} {rng.choice(words.ROLL_ENDS[move])}"
    if move in ("left", "right"):
        text = f"{rng.choice(words.SIDE_VERBS)} {rng.choice(words.SIDE_ENDS)}"
    elif move in ("up", "down") and rng.random() < 0.8:
        text = f"{rng.choice(words.LEVEL_VERBS)} {rng.choice(words.LEVEL_ENDS)}"
    else:
        text = rng.choice(words.VERBS[move])
    return text.format(d=move, o=opposite, n=_thing(rng))


def _noun(rng: random.Random, move: str) -> str:
    kind = ("side", "level", move, "roll", "shake")[_AXES[move]]
    opposite = {"left": "right", "right": "left"}.get(move, "")
    turn = rng.choice(words.ROLL_ENDS.get(move, ("",))[:-1] or ("",))
    return rng.choice(words.NOUNS[kind]).format(d=move, o=opposite, n=_thing(rng), r=turn)


def _tail(rng: random.Random, move: str) -> str:
    """Where the move leads, for some."""
    if move not in ("left", "right", "up", "down") or rng.random() > 0.3:
        return ""
    if move in ("left", "right"):
        return f" {rng.choice(words.SIDE_WAYS)} the {_thing(rng)}"
    return " " + rng.choice(words.LEVEL_WAYS[move]).format(n=_thing(rng))


def _third(verb: str) -> str:
    if verb.endswith(("sh", "ch", "ss")):
        return verb + "es"
    return verb[:-1] + "ies" if verb in ("dolly", "fly") else verb + ("es" if verb == "go" else "s")


def _gerund(verb: str) -> str:
    if verb in ("pan", "spin", "get", "drop", "crab", "run", "nod"):
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") else verb) + "ing"


def _dress(rng: random.Random, phrase: str) -> str:
    """Scenery around the motion: before, after or on both sides; what follows the motion may run on past the limit."""
    count = rng.choices((0, 1, 2, 3, 4), (25, 38, 22, 10, 5))[0]
    parts = [_scene(rng) for _ in range(count if phrase else max(1, count))]
    place = rng.randint(0, len(parts)) if rng.random() < 0.5 else rng.choice((0, len(parts)))
    while phrase and len(", ".join([*parts[:place], phrase]).encode()) > MAX_BYTES - 8:
        parts, place = parts[1:], place - 1
    text = ""
    for part in [*parts[:place], phrase, *parts[place:]] if phrase else parts:
        joints: tuple[str, ...] = (", ", ", ", ", ", ". ", ". ", " - ", "; ")
        if part is phrase and phrase.startswith(("the camera", "our view", "the view")):
            joints = (", ", ". ", ". ", " as ", " while ", ", and ", ". ", ": ")
        elif part is phrase and phrase.startswith(("a ", "an ")):
            joints = (", ", ". ", " with ", " with ")
        text += (rng.choice(joints) if text else "") + part
    return text


def _scene(rng: random.Random) -> str:
    """A piece of a picture's description; directions and speeds in it are none of the camera's."""
    kind = rng.random()
    if kind < 0.14:
        return rng.choice(words.ABOUT)
    if kind < 0.22:
        return rng.choice(words.STYLES)
    if kind < 0.46:
        return _happening(rng)
    start = rng.choice(words.FRAMES)
    if kind < 0.62:
        text = f"{start}{_named(rng, words.BEINGS)} {rng.choice(words.DOING)}"
    else:
        text = start + _named(rng, rng.choice((words.PLACES, words.THINGS, words.BEINGS)))
    if rng.random() < 0.45:
        text += f" {rng.choice(words.JOINTS)} {_named(rng, rng.choice((words.PLACES, words.THINGS)))}"
    return f"{text} {rng.choice(words.TIMES)}" if rng.random() < 0.25 else text


def _happening(rng: random.Random) -> str:
    """What people and things do and where they go: none of it asks for a motion of the camera."""
    if rng.random() < 0.3:
        return f"{_named(rng, words.BEINGS)} {rng.choice(words.GOING)} {rng.choice(words.WHERE)}"
    if rng.random() < 0.4:
        subject = rng.choice(words.NATURE)
    else:
        subject = rng.choice(words.FRAMES) + _named(rng, rng.choice((words.BEINGS, words.THINGS)))
    verb, _, rest = rng.choice(words.HAPPENING).partition(" ")
    form = rng.random()
    if form < 0.5:
        subject, verb = f"{subject} {rng.choice(('', '', 'is', 'are'))}".strip(), _gerund(verb)
    elif form < 0.8:
        verb = _third(verb)
    parts = [subject, verb, rest, rng.choice(words.WHITHER)]
    if rng.random() < 0.15:
        parts.insert(rng.choice((1, 4)), rng.choice(words.ADVERBS[rng.choice(SPEEDS)]))
    if rng.random() < 0.5:
        parts.append(f"{rng.choice(words.PASSING)} {_named(rng, rng.choice((words.PLACES, words.THINGS)))}")
    text = " ".join(part for part in parts if part)
    # A few read like orders to the camera ("truck back up"): none of those.
    return text if parse(text) == motion_of(("in",), 0) else _happening(rng)


def _named(rng: random.Random, nouns: Sequence[str]) -> str:
    named = [rng.choice(nouns) if rng.random() < 0.88 else _made_up(rng)]
    while rng.random() < 0.4:
        named.insert(0, rng.choice(words.QUALITIES) if rng.random() < 0.85 else _made_up(rng))
    return " ".join([rng.choice(("a", "a", "the", "two", "some", "")), *named]).strip()


def _thing(rng: random.Random) -> str:
    return rng.choice(rng.choice((words.PLACES, words.THINGS, words.BEINGS))) if rng.random() < 0.85 else _made_up(rng)


def _made_up(rng: random.Random) -> str:
    """A pronounceable non-word, so that unknown words learn to be ignored."""
    syllables = (rng.choice(words.LETTERS[0]) + rng.choice(words.LETTERS[1]) for _ in range(rng.randint(1, 4)))
    word = "".join(syllables) + rng.choice(("", "", *"nrslt", "ing", "ed"))
    return _made_up(rng) if re.fullmatch(_CAMERA_VERBS, word) else word


def _cased(rng: random.Random, text: str) -> str:
    """Capitals and the end as people write them."""
    style = rng.random()
    if style < 0.45:
        text = re.sub(r"(^|[.] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    elif style < 0.53:
        text = text.upper() if style < 0.49 else text.title()
    return text + rng.choices(("", ".", "!", "..."), (60, 34, 3, 3))[0]


def _mistyped(rng: random.Random, text: str) -> str:
    """One to three slips: letters of longer words swapped, lost, doubled or wrong, punctuation or spaces lost."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        spots = [match.start() + 1 for match in re.finditer(r"[A-Za-z]{4,}", text)]
        if not spots or rng.random() < 0.15:
            text = re.sub(r"[,.]", "", text, count=rng.choice((0, 1)))
            continue
        at = rng.choice(spots) + rng.randrange(3)
        kinds = (text[at : at + 2][::-1], text[at + 1 : at + 2], text[at] * 2 + text[at + 1 : at + 2])
        wrong = rng.choice("abcdefghijklmnopqrstuvwxyz") + text[at + 1 : at + 2]
        text = text[:at] + rng.choice((*kinds, wrong)) + text[at + 2 :]
    return text


# Reading back. Verbs that only cameras do, and verbs that need a camera before them or the start of a clause.
_CAMERA_VERBS = r"pan|pann\w+|pans|tilt\w*|zoom\w*|dolly|dollies|dollying|pedestal\w*|tracking|panning|camera"
_VERBS = (
    rf"{_CAMERA_VERBS}|shot|roll|turn|mov|track|truck|slid|sweep|swing|glid|drift|shift|crab|travel|crane|craning|boom"
    r"|look|push|pull|rotat|spin|twist|com|get|creep|fly|flies|go|climb|lift|sink|drop|ris|back|clos"
)
_ENDINGS = r"(?:e|e?s|[bnpt]?ing|ement|ion)?"
_NOUNS = r"camera|pan|tilt|crane|dolly|zoom|tracking|roll|rotation|spin|move|turn(?! sign)"
_DIRECTIONS = {
    "left": r"left(?:wards?)?",
    "right": r"right(?:wards?)?",
    "up": r"up(?:wards?)?|higher",
    "down": r"down(?:wards?)?|lower",
    "in": r"in|into|inward|closer|forwards?",
    "out": r"out|outward|back|backwards?|away",
    "clockwise": r"clockwise",
    "counterclockwise": r"counterclockwise",
}
_ALONE = {
    "up": r"rise\w*|rising|ascend\w*",
    "down": r"descend\w*|lowers?|lowering",
    "in": r"approach\w*|advanc\w*",
    "out": r"retreat\w*|withdraw\w*",
    "shake": r"shak\w*|trembl\w*|wobbl\w*|jitter\w*|unsteady",
}
_STATIC = (
    r"\bstatic\b|\blocked\b|\b(?:fixed|still|stationary|motionless) (?:camera|shot|frame)"
    r"|\bcamera (?:\w+ ){0,2}(?:still|fixed|stationary|motionless)|\bno (?:camera )?(?:motion|movement|moves|zoom)\b"
    r"|\b(?:not|never|without) mov(?:e|es|ing)\b|\bframe stays fixed|\btripod shot|\bwithout (?:any )?camera"
)
_SPEED_WORDS = (
    r"\bat a slow pace|\b(?:very )?(?:slow(?:ly)?|gentl[ey]|gradual(?:ly)?|softly|subtl[ey]|slight(?:ly)?|leisurely)\b",
    r"\b(?:very )?(?:fast|quick(?:ly)?|rapid(?:ly)?|swift(?:ly)?|sudden(?:ly)?|high.speed)\b|\bat high speed\b",
)
_NEUTRAL = r"\b(?:smooth(?:ly)?|steady|steadily|evenly|cinematic)\b"
_NOT_OURS = (
    r"camera on \w+|(?:man with|holding) a camera\b|zoom lens|shot (?:on|from)|\w+'s eye view|frying pan|stirring a pan"
    r"|(?:overhead|aerial|drone) view|slow motion|view of|close[- ]up|tracks in the snow|left behind"
)
_SPELLINGS = (
    (r"\b(?:counter|anti)[- ]?clockwise", "counterclockwise"),
    (r"\bhand-held", "handheld"),
    (r"\bdoesn't\b", "does not"),
    (rf"\b(?:{_NOT_OURS})", "thing"),
    (r"\b(?:from )?(?:left|right)[- ]to[- ](left|right)\b", r"\1"),
    (r"\b(?:over )?(?:to|towards?) the (left|right)\b", r"\1"),
    (r"\bin a (\w+) direction", r"\1"),
    (r"\b((?:mov(?:e|es|ing)|zoom\w*|push\w*)(?: the camera)?)((?: very)? (?:\w+ly|fast))? towards?\b", r"\1\2 closer"),
    (r"(?<=\w)-(?=\w)", " "),
)
_BREAKS = r"[.,;:!?+]| - |\b(?:and|then|while|as|with|plus|followed by|combined with)\b"


def parse(prompt: str) -> Motion:
    """The motion a prompt asks for by the words' grammar; no motion word at all: a slow zoom in.

    Exact on ``caption`` without typos and on plain requests; nano itself listens with a network.
    """
    moves: list[str] = []
    speeds: set[int] = set()
    still = False
    for clause in _clauses(prompt.lower()):
        said = {2 * index for index, pattern in enumerate(_SPEED_WORDS) if re.search(pattern, clause)}
        bare = " ".join(re.sub("|".join((*_SPEED_WORDS, _NEUTRAL)), " ", clause).split())
        found = _moves_in(bare)
        moves += found
        speeds |= said if found or not bare else set()
        still = still or bool(re.search(_STATIC, bare))
    if moves:
        return motion_of(tuple(dict.fromkeys(moves)), min(speeds, default=1))
    return Motion() if still else motion_of(("in",), 0)


def _clauses(text: str) -> list[str]:
    """Parts that each say one thing, in one spelling."""
    for pattern, plain in _SPELLINGS:
        text = re.sub(pattern, plain, text)
    return [part.strip() for part in re.split(_BREAKS, text)]


def _moves_in(clause: str) -> list[str]:
    """The moves of one clause: any verb serves after a word for the camera or at the clause's start."""
    ours = bool(re.search(r"\b(?:camera|cam|shot|view|lens|footage)\b", clause))
    start = r"\b" if ours else r"^(?:please |we |let us |an? |lateral |vertical )*"
    found = []
    for move, place in _DIRECTIONS.items():
        after = rf"(?: the camera| camera| shot| move(?:ment)?)?(?: going)? (?:{place})\b"
        asked = rf"{start}(?:{_VERBS}){_ENDINGS}{after}|\b(?:{_CAMERA_VERBS}){after}|{start}(?:{place}) (?:{_NOUNS})"
        if re.search(asked, clause):
            found.append(move)
    found += [move for move, pattern in _ALONE.items() if re.search(rf"{start}(?:{pattern})\b", clause)]
    return found + (["shake"] if "handheld" in clause else [])
