"""Of sentences that people would write, for how many does nano's camera point the right way?

    python benchmarks/prompts.py --record                             # the hand-written prompts below
    python benchmarks/prompts.py --vbench vbench2_i2v_full_info.json  # and VBench-I2V's camera motion prompts
    python benchmarks/prompts.py --model runs/nano_text2/export       # other weights

A prompt counts as read if every axis it asks for has the right sign and at least 40% of the asked size, and every other
axis stays below 0.25 (1 is the fast speed). No motion word asks for a slow zoom in. No video is made: what is judged is
the reading, text encoder and camera head together. The prompts below were written by hand for this purpose; training
captions come from ``swifti2v.train.prompts`` and hold none of them. VBench's file stays where it is: it is only read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from transformers import T5EncoderModel

from swifti2v.models.camera_head import CameraHead
from swifti2v.models.text import encode_prompts, nano_tokenizer
from swifti2v.train.prompts import motion_of

NANO = common.REPOSITORY / "src" / "swifti2v" / "nano"
TEXT_LENGTH = 128
ENOUGH, STILL = 0.4, 0.25
WANTED = 0.9
SPEEDS = {"slow": 0, "fast": 2}
VBENCH = {
    "camera pans left": "left",
    "camera pans right": "right",
    "camera tilts up": "up",
    "camera tilts down": "down",
    "camera zooms in": "in",
    "camera zooms out": "out",
    "camera static": "static",
}
# What is asked (moves, speed; "static"; "none": no motion word) and the prompt.
HAND_WRITTEN = """
none | A cat sleeping on a windowsill
none | Two kids build a sandcastle while the tide comes in
none | portrait of my grandmother, 1950s, faded colours
none | The lighthouse keeper looks out over the stormy sea
none | the last leaves of the year are falling down around the bench
none | a hummingbird hovering at a feeder, then it darts off to the left
none | A bright red tram turns right at the crossing in Lisbon
none | rush hour in Tokyo, everyone moving fast, neon everywhere
none | my dog rolls over and shakes off the water
none | Steam rising up from a bowl of ramen on a rainy evening
none | a frying pan on the stove, butter melting
none | the balloon drifts up and away over the vineyards
none | soldiers march from left to right past the palace gate
none | a lonely pickup truck left in the desert
none | close-up of an old clock, its hands turning clockwise
none | she turns around and smiles
none | The tide pulls back and leaves the sand shining.
none | Make this picture come alive!
none | waves
none | a potter at the wheel, the clay spinning round and round
none | upside-down reflection of the Alps in a puddle, early morning
none | he leans in closer to hear the secret
none | the horse gallops forward through knee-high grass, mane flying
static | static shot of a street market
static | A vase of tulips. The camera does not move.
static | Fishing boats at anchor, fixed camera
static | keep the camera perfectly still, only the candle flickers
static | no camera movement please, just let the clouds drift to the left
static | Locked-off shot: commuters rushing past in both directions
static | waterfall in the jungle, tripod, static camera
static | The frame is completely static while snow falls on the barn.
static | camera remains stationary as the dancer spins
static | an owl blinking on a branch, still camera
left | pan left
left | a mountain lake at dawn, pan left
left | The camera pans left across the crowded harbour.
left | Slow fog over the moor. Camera pans to the left.
left slow | The camera drifts slowly to the left along the shoreline
left slow | gentle pan towards the left, revealing the rest of the orchestra
left fast | quick pan left to the door as it bursts open
left | tracking shot to the left, following a row of market stalls
left | We move left along the shelf of old books
left | Please turn the camera to the left
left | truck left past the graffiti wall
left | A girl with a kite on the right side of the beach, camera panning left
left | panning from right to left over the skyline of Chicago at night
left | the view swings left
left | camera slides leftwards, macro of moss and tiny mushrooms
left slow | A steaming cup of coffee on a wooden desk; very slow leftward pan
left fast | whip pan left
right | pan right
right | old bridge in autumn, camera pans right
right | The camera is panning to the right over endless rice fields
right fast | the camera pans right quickly
right slow | slow pan to the right, golden hour, 35mm film
right | Pan right along the river bank until we see the castle
right | dolly right, a long table set for a wedding dinner
right | A knight stands guard on the left. The camera moves to the right.
right | truck right
right slow | Camera glides gently rightward across the piano keys
right | rightward tracking shot of cyclists
right | turn the camera right so we can see the window
right | left to right pan of the mountain range
right fast | a rapid sweep to the right across the stadium
right | the bird flies left, the camera pans right
right | pan over to the right and keep the castle in view
up | tilt up
up | a mountain lake at dawn, tilt up
up | Camera tilts up from her shoes to her face
up slow | slowly tilt up the trunk of a giant sequoia
up | the camera rises above the rooftops of Prague
up | pedestal up, a field of lavender
up | crane shot going up over the festival crowd
up | start at the base of the tower and tilt upward to the spire
up fast | A rocket on the launch pad, fast tilt up
up | the camera looks up at the cathedral ceiling
up slow | gentle upward tilt, rain on leaves
up | A climber hangs on the cliff, camera moving upwards
up | pan up from the bottom of the stairs
up | Sundown in the old town: camera tilts up to the church bell.
down | tilt down
down | Downtown skyscrapers at dusk, camera tilts down to the traffic
down | The camera tilts down to reveal a letter on the floor
down slow | slow tilt down, cherry blossoms
down | crane down into the courtyard
down | pan down from the stars to the campfire
down | The camera lowers toward a nest of robin eggs
down | camera descends through the clouds
down fast | quickly tilt down to the shoes of the runner
down | pedestal down, bottles in a wine cellar
down | An upright piano in an empty hall, downward tilt
down | a lookout tower. the camera moves down
in | zoom in
in slow | slow zoom in
in | A face in the crowd, camera zooms in
in | Push in on the detective as he realises the truth
in slow | the camera slowly pushes in on a burning candle
in | dolly in toward the throne
in | The camera moves closer to the sleeping baby
in | camera moves forward down a long hospital corridor
in fast | fast zoom in on the eye of the tiger
in slow | Slow dolly-in, a chessboard mid game, dramatic light
in | zooming in on the painting on the wall of the gallery
in | we push forward through the tall corn
in | get closer to the flower
in slow | gradual zoom into the keyhole of an antique door
in | A tiny cabin in the snow. Zoom in.
in | the pond is calm, leaves drift right, camera zooms in
out | zoom out
out | zoom out, a wooden house
out | The camera zooms out to reveal the whole valley
out slow | slowly zoom out from the little boat on the huge lake
out | pull back
out | the camera pulls back from the window, showing the family at dinner
out | dolly out, a chef plating dessert
out fast | rapid zoom out from earth into space
out | Camera moves backward through the temple gates
out slow | slow pull out, an astronaut alone on the red plain
out | zooming out, aerial shot of a stadium
out | A lit-up ferris wheel at the fair, camera pulls away
out | a teddy bear left on the bench, the camera pulls out
out | move back from the statue so that the square becomes visible
clockwise | roll clockwise
clockwise | The camera rotates clockwise above the dinner table
clockwise slow | looking straight down a spiral staircase, slow clockwise rotation
clockwise | spin the camera clockwise
clockwise fast | Concert lights, camera rolling clockwise fast
counterclockwise | roll counterclockwise
counterclockwise | the camera rolls counter-clockwise, trippy mushrooms forest
counterclockwise | anticlockwise rotation, kaleidoscope of stained glass
counterclockwise slow | Slowly rotate counterclockwise over the compass
shake | handheld camera
shake | shaky handheld footage of a protest
shake | Running through the woods at night, camera shake
shake | handheld shot, a street musician playing the violin
shake slow | subtle handheld movement, two friends talking in a diner
left in | pan left and zoom in
right in slow | the camera gently zooms in and pans to the right
up out | tilt up while zooming out, the Eiffel Tower
left out | The camera pans left, then zooms out to show the parade.
up in | Old oak in a meadow: camera tilts up and pushes in
down out | zoom out and tilt down over the rooftops
in clockwise slow | slow zoom in with a clockwise roll, hypnotic spiral
right shake | handheld, pan right across the crowd
in shake | Shaky cam, push in on the broken window
right up | camera moves right and up over the dunes
out counterclockwise | zoom out and rotate counterclockwise
left | PAN LEFT
in | ZOOM IN ON THE CAKE!!!
right | Camera Pans Right, Sunset Over The Bay
out | zoom   out...
up | tilt-up. misty forest
left | a quiet library camera pans left
right | camrea pans right, sailing boats
in | slow river, zom in
out | city lights,zoom out
down | camera titls down, old church
left slow | a quiet village square with a fountain, pigeons, and a cafe with red umbrellas; the camera pans slowly left
in | Cinematic, 4k, ultra detailed, volumetric light, an ancient library full of flying books, the camera moves forward
right | The camera pans right. A fisherman mends his nets on the left side of the pier while his son plays with a crab
up | A woman in a yellow raincoat waits at the bus stop, the camera tilts up to the dark clouds, dramatic mood
out slow | Starting on a close-up of a ladybug, the camera slowly pulls out until the whole garden can be seen
down | Hot air balloons over Cappadocia at sunrise, camera tilts down to the people watching from the hill
"""


def parsed_lines(text: str) -> list[tuple[str, tuple[float, ...]]]:
    """Prompts and the five numbers they ask for (``camera.Motion.code``)."""
    found = []
    for line in text.strip().splitlines():
        asked, _, prompt = line.partition(" | ")
        found.append((prompt, code_of(asked.split())))
    return found


def code_of(words: Sequence[str]) -> tuple[float, ...]:
    """Of ``left in slow``, ``static`` or ``none``."""
    speed = next((SPEEDS[word] for word in words if word in SPEEDS), 1)
    moves = [word for word in words if word not in SPEEDS]
    if moves == ["static"]:
        return motion_of((), speed).code()
    return motion_of(("in",), 0).code() if moves == ["none"] else motion_of(moves, speed).code()


def vbench_prompts(path: Path) -> list[tuple[str, tuple[float, ...]]]:
    """The prompts of the dimension ``camera_motion``; the last clause says what the camera does."""
    rows = [row["prompt_en"] for row in json.loads(path.read_text()) if "camera_motion" in row["dimension"]]
    return [(prompt, code_of([VBENCH[prompt.rsplit(", ", 1)[1]]])) for prompt in rows]


def is_right(read: Sequence[float], asked: Sequence[float]) -> bool:
    """Right signs and at least 40% of the size where asked; below 0.25 elsewhere."""
    return all(
        value / wanted >= ENOUGH if wanted else abs(value) < STILL for value, wanted in zip(read, asked, strict=True)
    )


@torch.no_grad()
def readings(folder: Path, prompts: Sequence[str], dtype: torch.dtype) -> list[list[float]]:
    """Five numbers a prompt, as the pipeline reads them."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    camera = CameraHead.from_pretrained(folder / "camera", torch_dtype=dtype)
    tokenizer, found = nano_tokenizer(), []
    for at in range(0, len(prompts), 32):
        states = encode_prompts(tokenizer, encoder, prompts[at : at + 32], TEXT_LENGTH)
        found += camera(states).tolist()
    return found


def scored(folder: Path, asked: Sequence[tuple[str, tuple[float, ...]]], dtype: torch.dtype) -> dict[str, Any]:
    found = readings(folder, [prompt for prompt, _ in asked], dtype)
    wrong = [
        {"prompt": prompt, "asked": [round(v, 2) for v in wanted], "read": [round(v, 2) for v in read]}
        for (prompt, wanted), read in zip(asked, found, strict=True)
        if not is_right(read, wanted)
    ]
    right = len(asked) - len(wrong)
    return {"right": right, "of": len(asked), "share": round(right / len(asked), 4), "wrong": wrong}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--vbench", type=Path, help="VBench-I2V's vbench2_i2v_full_info.json, read and never copied")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of encoder and head")
    parser.add_argument("--list", action="store_true", help="print the prompts read wrongly, too")
    asked = common.parsed(parser, arguments)
    torch.set_num_threads(asked.threads or torch.get_num_threads())
    record = common.Record("prompts whose camera motion nano reads rightly", asked, __file__)
    sets = {"hand_written": parsed_lines(HAND_WRITTEN)}
    if asked.tiny:
        sets = {"hand_written": sets["hand_written"][::20]}
    if asked.vbench:
        sets["vbench"] = vbench_prompts(asked.vbench)
    results: dict[str, Any] = {}
    for name, rows in sets.items():
        results[name] = scored(asked.model or NANO, rows, getattr(torch, asked.dtype))
        wrong = results[name].pop("wrong")
        for row in wrong if asked.list else ():
            print(row, flush=True)
    met = all(result["share"] >= WANTED for result in results.values())
    record.finish({"dtype": asked.dtype, "enough": ENOUGH, "still": STILL}, {**results, "met": met})


if __name__ == "__main__":
    main()
