"""Files appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swifti2v.core import RunError
from swifti2v.train.files import write_json, written


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    with written(target) as file:
        file.write(b"one")
        assert not target.exists()
    with pytest.raises(KeyError), written(target) as file:
        file.write(b"half of two")
        raise KeyError
    assert target.read_bytes() == b"one" and list(target.parent.iterdir()) == [target]


def test_json_and_refusals(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ä": [1, 2]})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"ä": [1, 2]}
    with pytest.raises(RunError, match="cannot write"):
        write_json(tmp_path / "x.json" / "y", 1)
