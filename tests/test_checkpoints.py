"""Bad checkpoint files get one line each; pickles stay shut; hashes are right."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_checkpoints import HEADS, TINY, original, same, swift
from torch import Tensor

from swifti2v.core import UsageError
from swifti2v.weights import hash_files, load_transformer, read_tensors, sha256, verify

# -------------------------------------------------------------------------------------------- bad files


def write_whole(folder: Path) -> dict[str, Tensor]:
    state = original(swift().state_dict())
    save_file(state, folder / "dit.safetensors")
    return state


def damage_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_whole(folder)
        file = folder / "dit.safetensors"
        file.write_bytes(change(file.read_bytes()))
        return file

    return make


def damage_keys(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = write_whole(folder)
        change(state)
        save_file(state, folder / "dit.safetensors")
        return folder / "dit.safetensors"

    return make


def damage_shards(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        swift().save_pretrained(folder / "shards", max_shard_size="60KB")
        change(folder / "shards")
        return folder / "shards"

    return make


def named(name: str, content: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def reindex(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        index = next(folder.glob("*.index.json"))
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return edit


def two_files(folder: Path) -> Path:
    write_whole(folder)
    (folder / "again.safetensors").write_bytes((folder / "dit.safetensors").read_bytes())
    return folder


def header(entries: dict[str, Any], size: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


Q = "blocks.0.self_attn.q.weight"
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere.safetensors", r"nowhere\.safetensors: no such"),
    "zero bytes": (named("a.safetensors"), r"a\.safetensors is empty"),
    "five bytes": (named("a.safetensors", b"12345"), "cut off after 5 bytes"),
    "text": (named("a.safetensors", b"this is a text file, not weights\n"), "not whole safetensors: header of"),
    "git lfs": (named("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "header is no JSON": (named("a.safetensors", struct.pack("<Q", 4) + b"{{{{"), "not a table"),
    "header is a list": (named("a.safetensors", header([])), "not a table"),  # type: ignore[arg-type]
    "header lacks offsets": (named("a.safetensors", header({"a": {"dtype": "F32"}})), "not a table"),
    "header of nothing": (named("a.safetensors", struct.pack("<Q", 0)), "header of 0 bytes"),
    "truncated": (damage_bytes(lambda b: b[:-100]), "damaged: its header describes"),
    "truncated in the header": (damage_bytes(lambda b: b[:200]), "not whole safetensors"),
    "trailing rubbish": (damage_bytes(lambda b: b + b"x"), "damaged: its header describes"),
    "header lies about length": (damage_bytes(lambda b: struct.pack("<Q", 2**62) + b[8:]), f"header of {2**62} bytes"),
    "header lies about a shape": (
        named("a.safetensors", header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, 4)),
        "damaged safetensors",
    ),
    "unknown dtype": (
        named("a.safetensors", header({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, 4)),
        "damaged safetensors",
    ),
    "wrong shape": (damage_keys(lambda s: s.update({Q: torch.ones(48, 47)})), r"to_q\.weight is \[48, 47\]"),
    "integers": (damage_keys(lambda s: s.update({Q: torch.ones(48, 48, dtype=torch.int64)})), "torch.int64"),
    "eight bits": (damage_keys(lambda s: s.update({Q: torch.ones(48, 48, dtype=torch.int8)})), "fp16 or bf16 file"),
    "fp8 scaled": (damage_keys(lambda s: s.update({"scaled_fp8": torch.ones(2)})), "fp8-scaled"),
    "extra key": (damage_keys(lambda s: s.update({"vace_blocks.0.q": torch.ones(2)})), r"does not have: 1 key: vace"),
    "missing key": (damage_keys(lambda s: s.pop(Q)), r"lacks 1 key: blocks\.0\.attn1\.to_q\.weight"),
    "half a prefix": (damage_keys(lambda s: s.update({f"model.{Q}": s.pop(Q)})), r"does not have: 1 key: model\."),
    "two layouts": (damage_keys(lambda s: s.update({"proj_out.weight": torch.ones(2)})), "mixes"),
    "no patch embedding": (damage_keys(lambda s: s.pop("patch_embedding.weight")), "lacks"),
    "a flat patch embedding": (damage_keys(lambda s: s.update({"patch_embedding.weight": torch.ones(48)})), "is \\[48"),
    "a LoRA": (damage_keys(lambda s: s.update({f"{Q[:-7]}.lora_A.weight": torch.ones(2)})), "is a LoRA"),
    "no tensors": (damage_keys(lambda s: s.clear()), "lacks"),
    "missing shard": (
        damage_shards(lambda f: first_shard(f).unlink()),
        "needs the shard diffusion_pytorch_model-0",
    ),
    "damaged shard": (damage_shards(lambda f: first_shard(f).write_bytes(b"")), r"00001-of-\S+ is empty"),
    "shard with other keys": (
        damage_shards(lambda f: save_file({"a": torch.ones(1)}, first_shard(f))),
        "disagree about",
    ),
    "shard outside": (
        damage_shards(reindex(lambda c: c["weight_map"].update({"a": "../../secret.safetensors"}))),
        "not a .safetensors file beside it",
    ),
    "index without a map": (damage_shards(reindex(lambda c: c.clear())), "no weight_map"),
    "index is no JSON": (
        damage_shards(lambda f: next(f.glob("*.index.json")).write_text("{")),
        "not readable JSON",
    ),
    "config is no JSON": (damage_shards(lambda f: (f / "config.json").write_text("[]")), "not a JSON object"),
    "config of another class": (
        damage_shards(lambda f: (f / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')),
        "holds a AutoencoderKLWan",
    ),
    "config of another size": (
        damage_shards(lambda f: (f / "config.json").write_text(json.dumps({**TINY, "ffn_dim": 32}))),
        r"is \[64, 48\], the model has \[32, 48\]",
    ),
    "config that builds nothing": (
        damage_shards(lambda f: (f / "config.json").write_text(json.dumps({**TINY, "num_layers": "two"}))),
        "does not build",
    ),
    "two checkpoints": (two_files, "holds 2 checkpoints"),
    "empty folder": (lambda folder: folder, "holds no .safetensors"),
    "another format": (named("a.gguf", b"GGUF"), "a.gguf is not a checkpoint"),
    "pickle": (named("a.pth", pickle.dumps({"a": 1})), "--allow-pickle"),
    "pickle in a folder": (lambda folder: named("a.bin", b"x")(folder).parent, "only pickles"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_get_one_line(tmp_path: Path, case: str) -> None:
    make, words = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        load_transformer(path, config=None if path.name == "shards" else HEADS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=4))
def test_no_damage_escapes_as_another_error(cut: int, flips: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.safetensors"
        save_file({"a": torch.ones(3, 4), "b.c": torch.ones(2, dtype=torch.float16)}, file, metadata={"k": "v"})
        content = bytearray(file.read_bytes())
        for place, change in flips:
            content[place % len(content)] ^= change
        file.write_bytes(bytes(content[: len(content) - cut] if cut < 200 else content))
        try:
            tensors = read_tensors(file)
        except UsageError as error:
            assert "f.safetensors" in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(value, Tensor) for value in tensors.values())


def test_pipelines_and_unknown_heads_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="whole pipeline"):
        load_transformer(tmp_path)
    write_whole(tmp_path)
    with pytest.raises(UsageError, match="width 48, not a multiple of 128"):
        load_transformer(tmp_path / "dit.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    write_whole(tmp_path)
    (tmp_path / "dit.safetensors").chmod(0)
    with pytest.raises(UsageError, match="cannot read"):
        read_tensors(tmp_path / "dit.safetensors")


# -------------------------------------------------------------------------------------------- pickles


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["SWIFTI2V_TEST_TRAP"],)


def test_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = original(swift().state_dict())
    for wrapped in (state, {"state_dict": state}, {"model": state, "step": 3}):
        torch.save(wrapped, tmp_path / "m.pth")
        with pytest.raises(UsageError, match="--allow-pickle"):
            load_transformer(tmp_path / "m.pth", config=HEADS)
        assert same(load_transformer(tmp_path / "m.pth", config=HEADS, allow_pickle=True)[0], swift())
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.pt", allow_pickle=True).keys() == state.keys()
    trap = tmp_path / "trap"
    monkeypatch.setenv("SWIFTI2V_TEST_TRAP", str(trap))
    bad: dict[str, Any] = {"evil": {"a": Malicious()}, "list": [1], "numbers": {"a": 1}, "empty": {}}
    for name, content in bad.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "zero.ckpt").write_bytes(b"")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "m.pth").read_bytes()[:-2000])
    for name in (*bad, "text", "zero", "cut"):
        with pytest.raises(UsageError, match=name) as caught:
            read_tensors(tmp_path / f"{name}.ckpt", allow_pickle=True)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


# -------------------------------------------------------------------------------------------- hashes, saving


def test_hashes_and_verify(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "sub" / "b").write_bytes(b"")
    (tmp_path / ".cache").write_bytes(b"hidden")
    manifest = hash_files(tmp_path)
    assert manifest == {
        "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "sub/b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert hash_files([tmp_path / "a"]) == hash_files(tmp_path / "a") == {"a": manifest["a"]}
    assert verify(tmp_path, manifest) == []
    (tmp_path / "a").write_bytes(b"abd")
    (tmp_path / "sub" / "b").unlink()
    (tmp_path / "new").write_bytes(b"")
    problems = verify(tmp_path, {**manifest, "../etc/passwd": "0"})
    assert len(problems) == 4 and any("leaves the folder" in p for p in problems)
    assert any(p.startswith("a: SHA-256") for p in problems) and "sub/b: missing" in problems
    assert "new: not in the manifest" in problems
    with pytest.raises(UsageError, match="cannot read"):
        sha256(tmp_path / "gone")
