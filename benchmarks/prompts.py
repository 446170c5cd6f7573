"""Of sentences that people would write, for how many does nano's camera point the right way?

    python benchmarks/prompts.py --record                             # the hand-written prompts beside this script
    python benchmarks/prompts.py --vbench vbench2_i2v_full_info.json  # and VBench-I2V's camera motion prompts
    python benchmarks/prompts.py --model runs/nano_text2/export       # other weights

A prompt counts as read if every axis it asks for has the right sign and at least 40% of the asked size, and every other
axis stays below 0.25 (1 is the fast speed). No motion word asks for a slow zoom in. No video is made: what is judged is
the reading, text encoder and camera head together. Training captions come from ``swifti2v.train.prompts`` and hold none
of the hand-written ones: prompts_1.txt, whose errors told what the captions lacked, and prompts_2.txt, written after
the captions were mended and before any reading of it. VBench's file stays where it is: it is only read.
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
SETS = ("prompts_1", "prompts_2")  # each line: what is asked (moves, speed; "static"; "none": no motion word) | prompt
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


def hand_written(name: str) -> list[tuple[str, tuple[float, ...]]]:
    """The prompts of a file beside this script, and the five numbers they ask for."""
    return parsed_lines(Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8"))


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
    sets = {name: hand_written(name)[:: 20 if asked.tiny else 1] for name in SETS}
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
