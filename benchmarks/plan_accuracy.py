"""Is ``plan`` right about memory?

    python benchmarks/plan_accuracy.py --record          # 640x384, 1280x704, 2560x1408
    python benchmarks/plan_accuracy.py --tiny

For every size: the plan's activation peak beside the peak of live tensors (``meters.LiveBytes``) in a whole run in
this process, in turn, and the plan's size of the process beside the peak RSS of the real command line, whose stages
overlap with ``--at-once``. Wanted: within 10 % and 15 %. One step a stage. The plan uses what ``doctor`` measured on
this machine; if it has not run, the same is measured here. tests/test_plan.py holds the same comparison, network by
network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

ACTIVATION_WITHIN, RSS_WITHIN = 0.10, 0.15


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["640x384", "1280x704", "2560x1408"])
    parser.add_argument("--num-frames", type=int, default=41)
    parser.add_argument("--at-once", action="store_true", help="the process's stages overlap")
    asked = common.parsed(parser, arguments)
    asked.steps = asked.steps_2 = 1
    if asked.tiny:
        asked.sizes, asked.num_frames = ["128x64"], 33
    record = common.Record("plan's memory against the measured one", asked, __file__)
    rows: list[dict[str, Any]] = []
    with common.workplace(asked) as (folder, model):
        # All children before this process becomes large; see common.
        for size in asked.sizes:
            told = ["--image", str(common.PHOTO), *common.clip_arguments(asked, model, size, asked.num_frames)]
            told += ["--at-once"] if asked.at_once else []
            run = common.generate(folder, told)
            run.output.unlink()
            rows.append({"size": size, "peak_rss_mb": common.megabytes(run.peak_rss)})
        calibration = calibrated()
        for row in rows:
            row |= beside_plan(asked, model, row, calibration)
            print(row, flush=True)
    settings = {"num_frames": asked.num_frames, "steps": 1, "steps_2": 1, "constant_mb": calibration.rss_bytes / 1e6}
    met = all(abs(row["activation_ratio"] - 1) <= ACTIVATION_WITHIN for row in rows)
    met = met and all(abs((row["rss_ratio"] or 1) - 1) <= RSS_WITHIN for row in rows)
    record.finish(settings, {"sizes": rows, "met": met})


def calibrated() -> Any:
    """This machine's constants."""
    from swifti2v.plan import calibrate, stored_calibration

    return stored_calibration() or calibrate()


def beside_plan(asked: argparse.Namespace, model: Path | None, row: dict[str, Any], calibration: Any) -> dict[str, Any]:
    """The plan for this size, the live bytes of a run, and planned / measured."""
    from swifti2v import costs
    from swifti2v.cli import Options
    from swifti2v.media import read_image
    from swifti2v.order import request_of
    from swifti2v.plan import plan
    from swifti2v.presets import get

    options = Options(
        image=str(common.PHOTO),
        prompt=common.PROMPT,
        preset="tiny-nano" if asked.tiny else "nano",
        model=None if model is None else str(model),
        size=row["size"],
        num_frames=asked.num_frames,
        num_inference_steps=1,
        num_inference_steps_2=1,
        seed=1,
    )
    preset, source = get(options.preset), read_image(common.PHOTO)
    request, _ = request_of(options, preset, source.size, source.sha256)
    networks = None if model is None else costs.read_nano(model, preset.prompt_tokens)
    planned = plan(request, preset, calibration, networks=networks)
    rss = plan(request, preset, calibration, networks=networks, overlap=asked.at_once).rss_bytes
    live = live_bytes(source.pixels, request, model)
    return {
        "planned_rss_mb": common.megabytes(rss),
        "rss_ratio": round(rss / 1e6 / row["peak_rss_mb"], 3) if row["peak_rss_mb"] else None,
        "live_mb": common.megabytes(live),
        "planned_live_mb": common.megabytes(planned.activation_bytes),
        "activation_ratio": round(planned.activation_bytes / live, 3),
    }


def live_bytes(pixels: Any, request: Any, model: Path | None) -> int:
    """Peak of the tensors that a run makes, the fitted photo among them."""
    from swifti2v import sources
    from swifti2v.meters import LiveBytes
    from swifti2v.presets import get
    from swifti2v.reference import fit_image

    pipeline = sources.load(get(request.preset), model=None if model is None else str(model))
    with LiveBytes() as live:
        photo = fit_image(pixels, request.size)
        live.reset_peak()
        for chunk in pipeline.stream(photo, request):
            del chunk  # as the writer does
    return live.peak


if __name__ == "__main__":
    main()
