"""``python -m swifti2v.train RECIPE --out runs/NAME``; ``accelerate launch -m swifti2v.train ...`` on many devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..core import RunError, UsageError
from .export import export as export_weights
from .loop import train
from .recipe import Recipe
from .recipes import changed, make, makers


def main(
    recipe: Annotated[str, typer.Argument(help="Which recipe; --list names them.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; goes on from its last checkpoint.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="What to train on; twice for a curriculum.")] = None,
    base: Annotated[str | None, typer.Option(help="Weights to start from: a folder or hub repository.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; may be raised later for the same run.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE, e.g. lr=1e-4.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Field that may differ from the checkpoint's.")] = None,
    tracker: Annotated[list[str] | None, typer.Option(help="Also log to tensorboard or trackio.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    shard: Annotated[bool | None, typer.Option(help="FSDP2; as accelerate launch says if not given.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the averaged weights here at the end.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy size on made-up data: seconds.")] = False,
    names: Annotated[bool, typer.Option("--list", help="Name the recipes.")] = False,
) -> None:
    """Train a recipe, or go on with it. A checkpoint is written whatever ends the run."""
    if names:
        for name, maker in makers().items():
            typer.echo(f"{name:16} {(maker.__doc__ or '').splitlines()[0]}")
        return
    try:
        if not recipe or out is None:
            raise UsageError("give a recipe and --out FOLDER; --list names the recipes")
        if threads is not None:
            torch.set_num_threads(threads)
        asked = ordered(make(recipe, tuple(data or ()), base=base, tiny=tiny), steps, tuple(assignments or ()))
        outcome = train(
            asked, out, minutes=minutes, allow=tuple(allow or ()), trackers=tuple(tracker or ()), sharded=shard
        )
        if not outcome.main:
            return
        typer.echo(f"{outcome.reason} at step {outcome.step}: {outcome.checkpoint}")
        if export is not None and outcome.reason == "finished":
            for name, folder in export_weights(asked, out, export).items():
                typer.echo(f"{name}: {folder}")
    except (UsageError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


def ordered(recipe: Recipe, steps: int | None, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with what the command line changes."""
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign:
            raise UsageError(f"--set {assignment} is not FIELD=VALUE, e.g. lr=1e-4")
        recipe = changed(recipe, name.strip(), text.strip())
    return recipe if steps is None else replace(recipe, steps=steps)


if __name__ == "__main__":
    typer.run(main)
