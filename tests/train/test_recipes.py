"""Every recipe at toy size really steps, learns one repeated batch, and exports what a pipeline can load."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from films import film
from test_objective import ToyClips
from toys import losses
from typer.testing import CliRunner

from swifti2v import tiny
from swifti2v.core import Size, UsageError
from swifti2v.lora import load_lora
from swifti2v.models.camera_head import CameraHead
from swifti2v.models.mobile_dit import MobileTransformer3DModel
from swifti2v.models.nano_vae import NanoVAE
from swifti2v.models.wan import SwiftI2VTransformer3DModel
from swifti2v.train import recipes, recipes_nano
from swifti2v.train.__main__ import main
from swifti2v.train.csg_source import Windows
from swifti2v.train.data import Clip
from swifti2v.train.distill import DISTILLATIONS
from swifti2v.train.export import export
from swifti2v.train.loop import train
from swifti2v.train.objective import FlowMatching, Levels
from swifti2v.train.recipe import Parts, Recipe, described, record
from swifti2v.train.recipes import RECIPES, changed, make
from swifti2v.train.shards import Plan, write_shards
from swifti2v.train.source import Repeated, Source
from swifti2v.train.vae import MovingPhotos, pixel_source


def on_one_item(recipe: Recipe) -> Recipe:
    """The recipe with its first item for ever, and, if it draws noise levels, always the highest."""
    objective = recipe.objective
    if isinstance(objective, FlowMatching):
        objective = replace(objective, levels=Levels(one=1.0))
    return replace(recipe, source=partial(_first, source=recipe.source), objective=objective)


def _first(parts: Parts, source: Any) -> Source[Any]:
    return Repeated(source(parts))


STEPS = {"vae": 5, "stage_one_lora": 12, "stage_two": 12}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_learns_one_batch_at_toy_size(name: str, tmp_path: Path) -> None:
    recipe = replace(on_one_item(make(name, tiny=True)), steps=STEPS.get(name, 30))
    assert train(recipe, tmp_path, quiet=True).step == recipe.steps
    course = losses(tmp_path)
    first, last = sum(course[:3]), sum(course[-3:])
    assert last < first - 0.05 * abs(first), course


def test_low_res_lora_is_a_lora_that_loads(tmp_path: Path) -> None:
    recipe = replace(make("stage_one_lora", tiny=True), steps=2)
    parts = recipe.build()
    names = {n for n, p in parts.modules["transformer"].named_parameters() if p.requires_grad}
    layers = {n.split(".lora_")[0].split(".", 2)[2] for n in names}
    assert layers == {
        *(f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")),
        "ffn.net.0.proj",
        "ffn.net.2",
    }
    train(recipe, tmp_path / "run", quiet=True)
    folder = export(recipe, tmp_path / "run", tmp_path / "out")["transformer"]
    model = tiny.wan_stage_one_dit()
    report = load_lora(model, folder, adapter_name="low_res")
    assert len(report.matched) == len(names) and not report.unexpected


def test_stage_two_comes_out_trained_and_resumes_from_itself(tmp_path: Path) -> None:
    recipe = replace(make("stage_two", tiny=True), steps=2)
    assert recipe.build().modules["transformer_2"].config.reference_is_untrained  # type: ignore[union-attr,union-attr]
    train(recipe, tmp_path / "run", quiet=True)
    folder = export(recipe, tmp_path / "run", tmp_path / "out")["transformer_2"]
    loaded = SwiftI2VTransformer3DModel.from_pretrained(folder)
    assert loaded.config.reference_is_untrained is False and loaded.config.in_channels == 8
    again = recipes.stage_two_parts(str(folder), tiny=False).modules["transformer_2"]
    assert isinstance(again, SwiftI2VTransformer3DModel) and again.dtype == torch.float32
    base = tmp_path / "base"
    tiny.wan_base_dit().save_pretrained(base)
    new: Any = recipes.stage_two_parts(str(base), tiny=False).modules["transformer_2"]
    assert new.config.in_channels == 8 and new.config.reference_is_untrained


def test_nano_exports_what_its_pipeline_loads(tmp_path: Path) -> None:
    classes = {"transformer": MobileTransformer3DModel, "camera": CameraHead, "vae": NanoVAE}
    for name in ("nano_one", "nano_text", "nano_vae"):
        recipe = replace(make(name, tiny=True), steps=1)
        train(recipe, tmp_path / name, quiet=True)
        for part, folder in export(recipe, tmp_path / name, tmp_path / "out").items():
            if part in classes:
                classes[part].from_pretrained(folder)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["camera", "text_encoder", "transformer", "vae"]


def test_full_sizes_are_those_of_the_paper() -> None:
    """Numbers only: nothing is built."""
    lora, two = (RECIPES[name](recipes.Given((Path("a"),))) for name in ("stage_one_lora", "stage_two"))
    assert (lora.lr, lora.build.args[1]) == (1e-4, 32)  # type: ignore[attr-defined]
    assert lora.objective.network == "wan_image"  # type: ignore[attr-defined]
    assert two.lr == 1e-5 and two.gradient_checkpointing and two.precision == "bfloat16"
    assert [phase.size for phase in recipes.CURRICULUM] == [Size(1920, 1088), Size(2560, 1408)]
    assert two.steps == sum(phase.steps for phase in recipes.CURRICULUM)


def test_the_curriculum_refuses_sizes_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "shards", lambda folder, seed, batch: ToyClips())
    source = recipes.ShardWindows((Path("a"), Path("b")))(Parts({}))
    with pytest.raises(UsageError, match=r"clips of 1024 pixels where the curriculum is at 1920x1088"):
        source.at(0)
    with pytest.raises(UsageError, match=r"at 2560x1408"):
        source.at(recipes.CURRICULUM[0].steps * recipes.GLOBAL_BATCH)
    alone = changed(RECIPES["stage_two"](recipes.Given((Path("a"),))), "source.segment_blocks", "[[1, 0.5], [5, 0.5]]")
    windows = changed(alone, "source.transition_share", "0.25").source(Parts({}))
    assert isinstance(windows, Windows)
    assert windows.segment_blocks == ((1, 0.5), (5, 0.5)) and windows.transition_share == 0.25
    with pytest.raises(UsageError, match="takes 1 --data, or 2"):
        recipes.ShardWindows(())(Parts({}))
    assert recipes.WholeShards((Path("a"),))(Parts({})).at(0).context == 0
    with pytest.raises(UsageError, match="takes one --data"):
        recipes.WholeShards(())(Parts({}))


def test_records_tell_recipes_apart() -> None:
    texts = [json.dumps(record(make(name, tiny=True), 1)) for name in RECIPES]
    assert len(set(texts)) == len(texts)
    one, other = (RECIPES["stage_two"](recipes.Given((Path(folder),))) for folder in "ab")
    assert described(one) != described(other)


def test_fields_from_the_command_line() -> None:
    recipe = make("nano_one", tiny=True)
    assert changed(recipe, "lr", "3e-4").lr == 3e-4 and changed(recipe, "lr", "1").lr == 1.0
    assert changed(recipe, "objective.levels.one", "0.5").objective.levels.one == 0.5
    assert changed(recipe, "optimizer", "adamw").optimizer == "adamw"
    assert changed(recipe, "betas", "[0.5, 0.6]").betas == (0.5, 0.6)
    for name, text, message in (
        ("lr", "fast", "lr=fast is not float"),
        ("rate", "1", "'rate' is no field of a Recipe"),
        ("lr.x", "1", "lr has no fields"),
        ("steps", "-1", "steps -1"),
    ):
        with pytest.raises(UsageError, match=message):
            changed(recipe, name, text)
    with pytest.raises(UsageError, match="'nano_three' is not known"):
        make("nano_three")
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        make("nano_one", (Path("nowhere"),))
    with pytest.raises(UsageError, match=r"takes one --data"):
        make("nano_one")


def test_moving_photos_are_a_function_of_the_index(tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (96, 160, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    listing = tmp_path / "photos.jsonl"
    listing.write_text(json.dumps({"path": "a.png", "split": "train", "sha256": "0"}) + "\n")
    source = MovingPhotos(listing, "train", ((2, 0, 32), (1, 1, 32)), 0, (160, 128))
    item = source.at(4)
    assert [tuple(group.shape) for group in item.groups] == [(2, 3, 1, 32, 32), (1, 3, 5, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(item.groups, source.at(4).groups, strict=True))
    assert min(float(group.min()) for group in item.groups) >= -1
    film(tmp_path / "film.mp4", (12, 20))
    shots = [{"start": 0, "end": 12}, {"start": 12, "end": 32}]
    rows = [s | {"path": "film.mp4", "split": "train", "kind": "film", "width": 96, "height": 64} for s in shots]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = pixel_source((listing, tmp_path / "clips.jsonl"), ((1, 1, 32),), (160,))
    kinds = {tuple(both.at(index).groups[0].shape) for index in range(6)}
    assert kinds == {(1, 3, 5, 32, 32)} and torch.equal(both.at(3).groups[0], both.at(3).groups[0])
    with pytest.raises(UsageError, match="give --data"):
        pixel_source((), ((1, 1, 32),), (160,))
    with pytest.raises(UsageError, match="no photo of split 'held_out'"):
        MovingPhotos(listing, "held_out", (), 0, (160,))
    with pytest.raises(UsageError, match="has no crop of 200 pixels"):
        MovingPhotos(listing, "train", ((1, 0, 200),), 0, (160,)).at(0)


def test_the_command_trains_goes_on_and_exports(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(main)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments)

    out = str(tmp_path / "run")
    listed = run("--list")
    assert listed.exit_code == 0 and all(name in listed.output for name in RECIPES | DISTILLATIONS)
    done = run("nano_text", "--out", out, "--tiny", "--steps", "2", "--set", "lr=1e-4")
    assert done.exit_code == 0 and "finished at step 2" in done.output
    refused = run("nano_text", "--out", out, "--tiny", "--steps", "3")
    assert refused.exit_code == 2 and "lr was 0.0001, is 0.003" in refused.output
    weights = str(tmp_path / "weights")
    more = run("nano_text", "--out", out, "--tiny", "--steps", "3", "--allow", "lr", "--export", weights)
    assert more.exit_code == 0 and (tmp_path / "weights" / "camera" / "config.json").is_file()
    assert run("--tiny").exit_code == 2 and run("nano_text", "--out", out, "--set", "lr").exit_code == 2


@pytest.mark.parametrize("stage", ["one", "two"])
def test_nano_trains_on_shards_and_shows_samples(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents from a folder, windows of both shapes, a video of reference, result and truth side by side."""
    pipeline = tiny.tiny_pipeline("nano")
    channels = len(pipeline.vae.config.scale_video)

    def make_clip(number: int) -> Clip:
        clean = torch.randn(channels, 7, 2, 4, generator=torch.Generator().manual_seed(number))
        count = recipes_nano.REFERENCES[stage]
        reference = (clean + 0.1).repeat(count, 1, 1, 1)
        return Clip(clean, reference, reference + 0.1, None, "pan left", str(number), "film")

    write_shards(tmp_path / "shards", Plan(count=4), make_clip)
    monkeypatch.setitem(recipes_nano.TINY, "hidden_size", 48)
    monkeypatch.setattr(recipes_nano, "STAGE_ONE", recipes_nano.STAGE_ONE | recipes_nano.TINY)
    monkeypatch.setattr(recipes_nano, "STAGE_TWO", recipes_nano.STAGE_TWO | recipes_nano.TINY)
    recipe = make(f"nano_{stage}", (tmp_path / "shards",))
    text = recipes_nano.text_parts(tiny=False).modules["text_encoder"]
    text.save_pretrained(tmp_path / "text")  # type: ignore[operator]
    build = partial(recipes_nano.dit_parts, stage, False, recipes_nano.package("vae"), tmp_path / "text")
    videos = replace(recipe.sample, load_vae=lambda: pipeline.vae, indices=(1,), steps=2)  # type: ignore[type-var]
    recipe = replace(recipe, build=build, sample=videos, steps=2, sample_every=2)
    train(recipe, tmp_path / "run", quiet=True)
    (video,) = (tmp_path / "run" / "samples" / "step-0000002").iterdir()
    shot = recipe.source(recipe.build()).at(1)
    frames = 4 * (shot.clean.shape[2] - 1) + 1
    with av.open(str(video)) as opened:
        shown = list(opened.decode(video=0))
    assert (len(shown), shown[0].width, shown[0].height) == (frames, 3 * 64, 32)


def test_channel_weights_follow_the_vae_scale() -> None:
    weights = recipes_nano.channel_weights([1.0, 2.0, 4.0])
    assert weights.mean() == pytest.approx(1.0) and float(weights[0] / weights[2]) == pytest.approx(4.0)
