"""The command line: parses, calls, prints, exits. Everything it does is a function of another module.

Nothing heavy is imported before a verb needs it: ``swifti2v --help`` answers at once.
Exit codes: 0 done, 1 failed after weights began to load, 2 refused before that, 130 interrupted.
"""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .options import FILE, RUN, BatchOptions, Options, option, takes_options

if TYPE_CHECKING:
    from .parallel import Ranks
    from .progress import Mode


class OneLineErrors(TyperGroup):
    """A command group whose own errors (unknown options, bad values) are one line, like all others."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra) or 0)
        except _click_exception() as error:
            # No arguments at all: click raises the help as an error.
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())
                sys.exit(2)
            _fail(error.format_message(), 2)


app = typer.Typer(
    name="swifti2v",
    cls=OneLineErrors,
    help="One photo and a sentence in, a 2K video out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="List presets, verify shipped weights.", no_args_is_help=True)
app.add_typer(models, name="models")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)]
Output = Annotated[str | None, typer.Option(metavar="FILE", help="Where to write the video.", show_default=False)]
Ranked = Annotated[
    int | None, typer.Option("--context-parallel", metavar="N", help="By N processes, as begun.", show_default=False)
]
Model = Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are now.", show_default=False)]


@app.command()
@takes_options
def generate(options: Options) -> None:
    """Make a video from a photo."""
    with reported(options.debug):
        from .order import plan_of, prepare, trace_file

        if options.dry_run:
            order = prepare(options)
            _print_plan(plan_of(options), options.json, order.notices)
            return

        def work(ranks: Ranks | None) -> None:
            from .fitting import at_once
            from .overlap import recorded
            from .produce import Execution, start

            order = prepare(options)
            with recorded(overlap=at_once(options.at_once, options.device), trace=trace_file(options.trace)) as lanes:
                execution = Execution(lanes, ranks)
                _run(lambda emit: start(order, emit, execution), _mode(options.json, options.quiet))

        _in_ranks(options.context_parallel, options.device, work)


@app.command()
@takes_options
def plan(options: Options) -> None:
    """What a video would cost in time, memory and disk, before anything loads."""
    with reported(options.debug):
        from .order import plan_of

        _print_plan(plan_of(options), options.json, ())


@app.command()
def resume(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The NAME.job folder of an interrupted run.")],
    model: Model = None,
    force: Annotated[bool, typer.Option("--force", help="Even if weights or libraries changed.")] = False,
    profile: Annotated[str | None, typer.Option(metavar="NAME", help="Fit into other memory than it began in.")] = None,
    at_once: Annotated[bool | None, option(RUN, "Stages at once or one at a time.", "--at-once/--in-turn")] = None,
    trace: Annotated[str | None, typer.Option(metavar="OUT.json", help="Write who worked when.")] = None,
    context_parallel: Ranked = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue an interrupted run; the result is the same as if it had not been."""
    with reported(debug):
        from . import fitting
        from .order import trace_file
        from .overlap import recorded
        from .produce import Execution
        from .produce import resume as go_on

        def work(ranks: Ranks | None) -> None:
            with recorded(overlap=fitting.at_once(at_once), trace=trace_file(trace)) as lanes:
                execution = Execution(lanes, ranks)
                made = partial(go_on, Path(job), model=model, profile=profile, force=force, execution=execution)
                _run(made, _mode(json, quiet))

        _in_ranks(context_parallel, None, work)


@app.command()
@partial(takes_options, kind=BatchOptions)
def batch(options: BatchOptions) -> None:
    """Make many videos, one a line of a jobs file; run again, it goes on where it was."""
    with reported(options.debug):
        from .batch.command import run
        from .progress import batch_view

        with batch_view(_mode(options.json, options.quiet)) as emit:
            tally = run(options, emit)
        if not options.json:
            print(f"{len(tally.made)} made, {len(tally.failed)} failed")
        sys.exit(1 if tally.failed else 0)


@app.command()
def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A video made by swifti2v.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What made a file: prompt, seed, sizes, weights, versions."""
    with reported(debug):
        from .origin import metadata_of

        _print_record(metadata_of(Path(file)), as_json=json)


@app.command()
def rerun(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A video made by swifti2v.")],
    image: Annotated[str | None, typer.Option(metavar="PHOTO", help="The photo, if it is not found.")] = None,
    output: Output = None,
    model: Model = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a file again from what it says about itself; finds the photo by its checksum."""
    with reported(debug):
        from .fitting import at_once
        from .order import prepare_again
        from .overlap import Lanes
        from .produce import Execution, start

        order = prepare_again(Path(file), image=image, output=output, model=model)
        _run(lambda emit: start(order, emit, Execution(Lanes(overlap=at_once()))), _mode(json, quiet))


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="FILE|DIR", help="A clip, or a folder of clips.")],
    image: Annotated[str | None, option(FILE, "The photo, if it is not found.", metavar="PHOTO")] = None,
    reference: Annotated[str | None, option(FILE, "A clip that it should look like.", metavar="CLIP")] = None,
    json: Annotated[str | None, option(FILE, "Write every number here.", metavar="OUT.json")] = None,
    picture: Annotated[str | None, option(FILE, "Draw frames and curves here.", metavar="OUT.png")] = None,
    segment_frames: Annotated[int | None, option(FILE, "Frames a segment, if the file does not say.")] = None,
    overwrite: Annotated[bool, option(FILE, "Replace files that exist.", "--overwrite")] = False,
    debug: Debug = False,
) -> None:
    """How good is a clip? First frame, drift, flicker, seams, camera."""
    with reported(debug):
        from .evaluate.command import Asked, run
        from .progress import view

        with view("auto") as emit:
            rows = run(Asked(target, image, reference, json, picture, segment_frames, overwrite), emit)
        _print_rows(["measure", "value", ""], rows, as_json=False)


@app.command()
def export(
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="A new folder.")],
    model: Annotated[str, option(FILE, "mobile-nano, or a MobileI2V pipeline in diffusers layout.", metavar="FOLDER")],
    size: Annotated[str | None, option(FILE, "WIDTHxHEIGHT, built in.", metavar="WxH")] = None,
    num_frames: Annotated[int | None, option(FILE, "Length, built in.")] = None,
    steps: Annotated[int | None, option(FILE, "Denoising steps, built in.")] = None,
    formats: Annotated[list[str] | None, option(FILE, "onnx, coreml or executorch; repeat.", "--format")] = None,
    precision: Annotated[str, option(FILE, "Of ONNX weights: float32, float16 or int8.")] = "float32",
    debug: Debug = False,
) -> None:
    """MobileI2V as ONNX, Core ML or ExecuTorch graphs; for ONNX with a script that needs no torch."""
    with reported(debug):
        from .core import Size
        from .export.blueprints import Clip
        from .export.bundle import export as write

        clip = Clip(None if size is None else Size.parse(size), num_frames, steps)
        wanted: Any = tuple(formats or ("onnx",))
        kind: Any = precision
        write(model, out, clip, formats=wanted, precision=kind)
        print(out)


@models.command("list")
def models_list(json: Json = False, debug: Debug = False) -> None:
    """Presets, where their weights come from, and whether they are here."""
    with reported(debug):
        from . import shipped

        _print_rows(["preset", "weights", "from", "what"], shipped.rows(), as_json=json)


@models.command("verify")
def models_verify(write: Annotated[bool, typer.Option("--write", hidden=True)] = False, debug: Debug = False) -> None:
    """Compare the shipped weights with their recorded checksums."""
    with reported(debug):
        from . import shipped

        if write:
            print(f"wrote {shipped.write_manifest()} checksums")
        else:
            print(f"{shipped.verify_shipped()} files are as shipped")


@models.command("convert")
def models_convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A Wan transformer in any layout, or MobileI2V's.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where to write it in diffusers layout.")],
    base: Annotated[str | None, typer.Option(metavar="PATH", help="Whole checkpoint under a partial FILE.")] = None,
    vae: Annotated[bool, typer.Option("--vae", help="FILE is a Wan VAE.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .pth and .pt files too.")] = False,
    debug: Debug = False,
) -> None:
    """Read a checkpoint of another layout, report its keys, write it in diffusers layout."""
    with reported(debug):
        from .mobile_weights import is_published, load_mobile
        from .weights import load_transformer, load_vae, write_diffusers

        if vae:
            model, report = load_vae(file, allow_pickle=allow_pickle)
        elif is_published(file, allow_pickle=allow_pickle):
            model, report = load_mobile(file, allow_pickle=allow_pickle)
        else:
            model, report = load_transformer(file, base=base, allow_pickle=allow_pickle)
        print(report)
        print(write_diffusers(model, folder))


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Skip the measurements.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check this machine, measure it, and tell how long a video takes here."""
    with reported(debug):
        from . import doctor as checks

        findings = list(checks.examine(quick=quick))
        _print_rows(["", "check", "found"], [item.row() for item in findings], as_json=json)
        if any(item.ok is False for item in findings):
            sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``swifti2v`` command: runs and exits."""
    app(args=arguments, prog_name="swifti2v")


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors that a person can do something about become one line and an exit code; bugs keep their traceback."""
    import logging
    import warnings

    from .core import UsageError

    # Libraries warn of things that only developers can change; a user's stderr is for our one line.
    logging.disable(logging.NOTSET if debug else logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted", 130)
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        if debug:
            raise
        message = str(error) or type(error).__name__
        _fail(message, 2 if isinstance(error, UsageError) else 1)
    finally:
        logging.disable(logging.NOTSET)


def _fail(message: str, code: int) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def _click_exception() -> Any:
    """Click's base error, whether typer brings its own copy of click or uses the installed one."""
    return next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _mode(json: bool, quiet: bool) -> Mode:
    return "json" if json else "quiet" if quiet else "auto"


def _run(work: Callable[[Any], Path], mode: Mode) -> None:
    """Do the work under the view, then print where the result is."""
    from .progress import view

    with view(mode) as emit:
        path = work(emit)
    if mode == "auto":
        print(path)


def _in_ranks(count: int | None, device: str | None, work: Callable[[Ranks | None], None]) -> None:
    """Do the work in this process; with a ``count``, as the first of so many, and in the others what it asks for."""
    if count is None:
        work(None)
        return
    from . import parallel, produce

    leads: bool | None = None
    try:
        with parallel.joined(count, device=device) as ranks:
            leads = ranks.leads
            if ranks.leads:
                work(ranks)
            else:
                produce.follow(ranks)
    except (parallel.Ended, KeyboardInterrupt) as stop:
        if leads or (leads is None and isinstance(stop, KeyboardInterrupt)):
            raise
        sys.exit(1)  # in silence: the first process says what happened


def _print_plan(plan: Any, as_json: bool, notices: Sequence[str]) -> None:
    if as_json:
        print(plan.to_json())
        return
    for line in (*notices, *plan.lines()):
        print(line)


def _print_record(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json_text.dumps(record, indent=2, ensure_ascii=False))
        return
    _print_rows(["", ""], [[key, str(value)] for key, value in _flat(record)], as_json=False)


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield prefix + key, value


def _print_rows(titles: list[str], rows: Sequence[Sequence[str]], *, as_json: bool) -> None:
    """A table for people, or JSON objects by title."""
    if as_json:
        print(json_text.dumps([dict(zip(titles, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles, box=None, show_header=any(titles), pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console(soft_wrap=False).print(table)
