"""The small decoder learns from the large one: which stages meet, who gets gradients, what each term is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from test_recipes import on_one_item
from torch import Tensor, nn
from toys import losses

from swifti2v.core import UsageError
from swifti2v.models.turbo_decoder import FEATURES, TurboDecoder
from swifti2v.train.export import export
from swifti2v.train.loop import train
from swifti2v.train.recipe import Parts
from swifti2v.train.recipes import make
from swifti2v.train.recipes_nano import MadeUpClips
from swifti2v.train.source import seeded
from swifti2v.train.turbo import STAGES, Projections, TurboDistillation, teacher_stages, turbo_parts
from swifti2v.train.vae import Clips

CLIPS = MadeUpClips(side=32, blocks=2)


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    return turbo_parts("", tiny=True)


class Apart(nn.Module):
    """A perceptual distance anyone can compute."""

    def forward(self, shown: Tensor, clip: Tensor) -> Tensor:
        return (shown - clip).square().mean(dim=(1, 2, 3, 4)) + 2.0


def test_at_true_size_two_stages_meet_directly_and_one_is_projected() -> None:
    with torch.device("meta"):
        vae, decoder = AutoencoderKLLTXVideo(), TurboDecoder()
    widths = {"mid_block": (512, 512), "up_block_0": (512, 512), "up_block_1": (256, 512)}
    own = dict(zip(FEATURES, decoder.decode(torch.zeros(1, 128, 2, 2, 2, device="meta"), True).features, strict=True))
    assert {stage: own[stage].shape[1] for stage in STAGES} == {stage: pair[0] for stage, pair in widths.items()}
    assert set(teacher_stages(vae)) == set(FEATURES)
    projections = Projections(widths)
    assert list(projections.stages) == ["up_block_1"]
    seen = projections({stage: torch.zeros(1, pair[0], 1, 1, 1) for stage, pair in widths.items()})
    assert {stage: x.shape[1] for stage, x in seen.items()} == {stage: 512 for stage in STAGES}


def test_the_loss_by_hand(parts: Parts) -> None:
    clips = CLIPS.at(0)
    vae, decoder, projections = parts.frozen["vae"], parts.modules["decoder"], parts.modules["projections"]
    kept: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, stage=stage: kept.__setitem__(stage, output))
        for stage, module in teacher_stages(vae).items()
    ]
    absolute, distances, bases = [], [], []
    with torch.no_grad():
        for clip in clips.groups:
            z = vae.encode(clip).latent_dist.mode()  # type: ignore[operator]
            decoded = vae.decode(z).sample  # type: ignore[operator]
            output = decoder.decode(z, features=True)  # type: ignore[operator]
            seen = projections(dict(zip(FEATURES[:3], output.features[:3], strict=True)))
            absolute.append((output.sample - clip).abs().mean())
            distances.append(sum((seen[stage] - kept[stage]).square().mean() for stage in STAGES))
            bases.append((decoded - clip).square().mean())
    for hook in hooks:
        hook.remove()
    plain, whole = (TurboDistillation(features=weight)(parts, clips, seeded(0, 0)) for weight in (0.0, 2.0))
    assert float(plain.value.detach()) == pytest.approx(float(sum(absolute)) / 2, rel=1e-4)
    expected = float(sum(absolute) + 2 * sum(distances)) / 2
    assert float(whole.value.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(whole.base) == pytest.approx(float(sum(bases)) / 2, rel=1e-4)
    judged = replace(parts, frozen={**parts.frozen, "perceptual": Apart()})
    loss = TurboDistillation(features=0.0, perceptual=3.0)(judged, clips, seeded(0, 0))
    squares = float(loss.error)
    assert float(loss.value.detach()) == pytest.approx(float(plain.value.detach()) + 3 * (squares + 2), rel=1e-4)


def test_the_vae_learns_nothing(parts: Parts) -> None:
    TurboDistillation()(parts, CLIPS.at(0), seeded(0, 0)).value.backward()
    assert all(p.grad is None for p in parts.frozen["vae"].parameters())
    grown = {name for name, module in parts.modules.items() if any(p.grad is not None for p in module.parameters())}
    assert grown == {"decoder", "projections"}
    assert list(parts.modules["projections"].stages) == ["up_block_1"]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="stages tail are not among"):
        TurboDistillation(stages=("tail",))


def test_the_small_decoder_learns_a_clip_and_is_exported_alone(tmp_path: Path) -> None:
    recipe = replace(on_one_item(make("turbo", tiny=True)), steps=25)
    train(recipe, tmp_path / "run", quiet=True)
    course = losses(tmp_path / "run")
    assert sum(course[-3:]) < 0.9 * sum(course[:3]), course
    folders = export(recipe, tmp_path / "run", tmp_path / "out")
    assert set(folders) == {"decoder"}
    decoder: Any = TurboDecoder.from_pretrained(folders["decoder"])
    assert decoder.decode(torch.zeros(1, 8, 2, 1, 1)).sample.shape == (1, 3, 9, 32, 32)


def test_it_learns_clips_of_seventeen_frames_at_true_size() -> None:
    recipe = make("turbo")
    assert (recipe.lr, recipe.betas, recipe.ema_decay, recipe.accumulation) == (1e-4, (0.9, 0.95), 0.999, 8)
    assert isinstance(CLIPS.at(0), Clips) and CLIPS.at(0).groups[1].shape[2] == 9
