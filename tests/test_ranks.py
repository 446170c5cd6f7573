"""Which numbers of processes may share a clip, told before anything loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from swifti2v import presets
from swifti2v.core import Request, UsageError
from swifti2v.options import Options
from swifti2v.order import plan_of
from swifti2v.ranks import TRANSFORMERS, Split, legal_ranks, split_of, window_tokens


def request(name: str, **fields: Any) -> Request:
    return presets.resolve(presets.get(name), prompt="pan", seed=1, **fields)[0]


def test_the_true_size_takes_two_four_and_eight() -> None:
    wan, made = presets.get("wan"), request("wan", size="2560x1408", num_frames=81)
    assert window_tokens(wan, made) == ([18480], [14080, 17600])  # Stage II's first and last window, and the others
    for count in (2, 4, 8):
        assert split_of(count, wan, made) == Split(("transformer", "transformer_2"))
    for count, nearest in ((3, 2), (5, 4), (7, 8), (16, 8), (1, 2), (-1, 2)):
        with pytest.raises(UsageError, match=f"context_parallel {count}: .* nearest legal value: {nearest}$"):
            split_of(count, wan, made)


def test_stage_one_alone_may_be_left_to_one_process_but_not_silently() -> None:
    refine, made = presets.get("wan-refine"), request("wan-refine", size="2560x1408", num_frames=81)
    split = split_of(2, refine, made)
    assert split.parts == ("transformer_2",)
    assert re.search("Stage I's 40 heads .* 32277: the first process computes Stage I by itself", split.notices[0])
    assert split_of(2, refine, made.model_copy(update={"motion_sha256": "0" * 64})) == Split(TRANSFORMERS)
    with pytest.raises(UsageError, match=r"Stage II's 24 heads .* 3444 and 4305; nearest legal value: 3$"):
        split_of(2, refine, request("wan-refine", size="1312x672", num_frames=81))


def test_every_window_of_a_long_clip_counts() -> None:
    made = request("tiny-wan", size="128x64", num_frames=33)
    assert window_tokens(presets.get("tiny-wan"), made) == ([10], [32, 40])  # 5 blocks of 2; 4, then 5 blocks of 8
    assert legal_ranks([10, 32, 40]) == [2] and legal_ranks([7, 14]) == [7] and legal_ranks([3, 5]) == []


def test_heads_are_those_of_the_folder(tmp_path: Path) -> None:
    for name, heads in (("transformer", 4), ("transformer_2", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    wan, made = presets.get("wan"), request("wan", size="1536x768", num_frames=33)
    assert split_of(3, wan, made, str(tmp_path)).parts == ("transformer_2",)
    with pytest.raises(UsageError, match=r"Stage II's 9 heads .* nearest legal value: 3$"):
        split_of(2, wan, made, str(tmp_path))
    (tmp_path / "transformer_2" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"transformer_2 has an unusable config\.json"):
        split_of(3, wan, made, str(tmp_path))


@pytest.mark.parametrize("name", ["nano", "mobile-nano", "tiny-nano"])
def test_presets_without_wan_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"context_parallel 2: {name} has no Wan transformer to split; .*wan-refine"):
        split_of(2, presets.get(name), request(name))


def test_the_command_line_checks_at_the_door() -> None:
    said: dict[str, Any] = {"preset": "wan-refine", "prompt": "pan", "size": "2560x1408", "num_frames": 81}
    plan_of(Options(**said, context_parallel=2))
    with pytest.raises(UsageError, match="context_parallel 3"):
        plan_of(Options(**said, context_parallel=3))
    with pytest.raises(UsageError, match="device 'cuda:1' is not for several processes"):
        plan_of(Options(**said, context_parallel=2, device="cuda:1"))
