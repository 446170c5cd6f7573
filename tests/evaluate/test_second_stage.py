"""Stage II with choices changed: the same function as the pipeline's when nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swifti2v import presets
from swifti2v.evaluate.second_stage import NONE, Settings, decoded, plan, reference_latents, refined, second_stage
from swifti2v.pipeline import SwiftI2VPipeline
from swifti2v.segments import CSG
from swifti2v.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> SwiftI2VPipeline:
    return tiny_pipeline("nano")


def clip() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    low = torch.rand(3, 21, 16, 32, generator=generator) * 2 - 1
    return low, torch.rand(3, 64, 128, generator=generator) * 2 - 1


def test_is_the_pipelines_second_stage(pipeline: SwiftI2VPipeline) -> None:
    low, photo = clip()
    request, _ = presets.resolve(
        pipeline.preset, prompt="", size="128x64", num_frames=21, seed=0, num_inference_steps_2=2
    )
    streamed = torch.cat(
        [chunk.frames for chunk in pipeline.stream(photo[None, :, None], request, motion=[low[None]])], 2
    )
    found = second_stage(pipeline, low, photo, Settings(steps=2))
    assert torch.equal(found[:, 1:], streamed[0, :, 1:])  # frame 0 is the photo itself there


def test_without_stage_two_the_reference_is_decoded(pipeline: SwiftI2VPipeline) -> None:
    low, photo = clip()
    reference = reference_latents(pipeline, low, photo, Settings())
    channels = reference.shape[1] // 2
    assert torch.equal(refined(pipeline, reference, Settings(), NONE), reference[:, :channels])
    plain = reference_latents(pipeline, low, photo, Settings(carries=False))
    assert torch.equal(plain[:, :channels], plain[:, channels:]) and not torch.equal(plain, reference)
    assert decoded(pipeline, plain[:, :channels], photo, Settings()).shape == (3, 21, 64, 128)


def test_every_choice_changes_the_result(pipeline: SwiftI2VPipeline) -> None:
    low, photo = clip()
    reference = reference_latents(pipeline, low, photo, Settings())
    usual = refined(pipeline, reference, Settings())
    for other in (
        Settings(anchor=False),
        Settings(segmented=False),
        Settings(steps=2),
        Settings(seed=1),
        Settings(CSG(neighbor_blocks=0)),
        Settings(CSG(segment_blocks=2)),
        Settings(CSG(rope_positions="window")),
    ):
        assert not torch.equal(refined(pipeline, reference, other), usual), other
    soft = reference_latents(pipeline, low, photo, Settings(photo_first=False))
    assert not torch.equal(soft[:, :, 0], reference[:, :, 0])


def test_windows() -> None:
    assert [w.blocks for w in plan(6, Settings())] == [(0, 1, 2, 3), (0, 3, 4, 5)]
    assert [w.blocks for w in plan(6, Settings(segmented=False))] == [(0, 1, 2, 3, 4, 5)]
    assert [w.blocks for w in plan(6, Settings(anchor=False))] == [(1, 2, 3), (3, 4, 5)]
