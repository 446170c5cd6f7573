"""Checkpoint files: opened safely, checked, hashed. Knows file formats, not models.

Every damaged, missing or unsafe file is refused in one line that names it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .core import UsageError

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def some(keys: Iterable[str], limit: int = 3) -> str:
    """``5 keys: a, b, c, ...`` for one-line messages."""
    names = sorted(keys)
    more = ", ..." if len(names) > limit else ""
    return f"{len(names)} key{'s' * (len(names) != 1)}: {', '.join(names[:limit])}{more}"


def refuse(name: str, what: str, keys: Iterable[str]) -> None:
    """UsageError if there are any such keys."""
    keys = list(keys)
    if keys:
        raise UsageError(f"{name} has {what}: {some(keys)}")


def read_tensors(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, memory-mapped on the CPU.

    ``path`` is a ``.safetensors`` file, a ``*.safetensors.index.json`` or a folder that holds one of them.
    Pickles (.pth, .pt, .bin, .ckpt) are opened with ``allow_pickle`` only, and then weights-only; a dict
    wrapped in ``state_dict`` or ``model`` is unwrapped. Anything else, or anything damaged, is a UsageError.
    """
    return read_files(locate(path, allow_pickle=allow_pickle), allow_pickle)


def locate(path: str | Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files that make up a checkpoint: one file, or an index and its shards. Refuses missing ones."""
    file = Path(path)
    if file.is_dir():
        file = _in_folder(file, allow_pickle)
    if not file.is_file():
        raise UsageError(f"{file.name}: no such checkpoint file ({file})")
    if file.suffix in PICKLES and not allow_pickle:
        raise UsageError(
            f"{file.name} is a pickle, which can run code when it is opened; "
            "convert it to .safetensors, or pass --allow-pickle if you trust its author"
        )
    if file.name.endswith(".index.json"):
        return [file, *(file.parent / name for name in sorted(set(_weight_map(file).values())))]
    if file.suffix != ".safetensors" and file.suffix not in PICKLES:
        raise UsageError(f"{file.name} is not a checkpoint: expected .safetensors, .safetensors.index.json or a folder")
    return [file]


def _in_folder(folder: Path, allow_pickle: bool) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{p}" for p in PICKLES if allow_pickle)):
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{folder.name} holds {len(found)} checkpoints ({some(p.name for p in found)}); name one")
    if (folder / "model_index.json").is_file():
        raise UsageError(f"{folder.name} is a whole pipeline; give one of its folders, e.g. {folder.name}/transformer")
    pickles = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
    hint = f", only pickles ({pickles[0]}): convert them or pass --allow-pickle" if pickles else ""
    raise UsageError(f"{folder.name} holds no .safetensors file{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(v, str) for v in content.values()):
        raise UsageError(f"{index.name} is not a shard index: it has no weight_map of key to file name")
    for name in sorted(set(content.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{index.name} names the shard {name!r}, which is not a .safetensors file beside it")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index.name} needs the shard {name}, which is missing")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file, or a UsageError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.name} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path.name} is not a JSON object")
    return content


def read_files(files: list[Path], allow_pickle: bool) -> dict[str, Tensor]:
    if not files[0].name.endswith(".index.json"):
        return _read_pickle(files[0]) if files[0].suffix in PICKLES and allow_pickle else _read_safetensors(files[0])
    listed = _weight_map(files[0])
    tensors: dict[str, Tensor] = {}
    for shard in files[1:]:
        held = _read_safetensors(shard)
        wanted = {key for key, name in listed.items() if name == shard.name}
        if held.keys() != wanted:
            raise UsageError(f"{shard.name} and {files[0].name} disagree about {some(held.keys() ^ wanted)}")
        tensors.update(held)
    return tensors


def tensor_names(file: Path) -> set[str]:
    """Names of the tensors of a .safetensors file or a shard index, without reading the tensors."""
    if file.name.endswith(".index.json"):
        return set(_weight_map(file))
    read_metadata(file)
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in a safetensors header; also checks the header against the file's length."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            body = stream.read(length) if length <= min(size - 8, 100_000_000) else b""
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror}") from None
    if size < 8:
        raise UsageError(f"{path.name} is {'empty' if size == 0 else f'cut off after {size} bytes'}; fetch it again")
    if start == b"version ":
        raise UsageError(f"{path.name} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if not body:
        raise UsageError(f"{path.name} is not whole safetensors: header of {length} bytes in a file of {size} bytes")
    try:
        header = json.loads(body)
        metadata = header.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UsageError(f"{path.name} is not safetensors: its header is not a table of tensors") from None
    if end != size:
        raise UsageError(f"{path.name} is damaged: its header describes {end} bytes, the file has {size}")
    return metadata


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_metadata(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"{path.name} is damaged safetensors: {first_line(error)}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size == 0:
        raise UsageError(f"{path.name} is empty; fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        raise UsageError(f"{path.name} is not a plain dict of tensors in PyTorch format: {first_line(error)}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path.name} holds {type(content).__name__}, not a dict of named tensors")
    wrong = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise UsageError(f"{path.name} holds things that are not tensors, {some(wrong)}")
    return dict(content)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in 4 MiB pieces."""
    digest, path = hashlib.sha256(), Path(path)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror}") from None
    return digest.hexdigest()


def hash_files(source: str | Path | Iterable[str | Path]) -> dict[str, str]:
    """Relative posix name -> SHA-256 of a folder's files (hidden ones left out), of one file, or of several."""
    if isinstance(source, (str, Path)):
        root = Path(source)
        if not root.is_dir():
            return {root.name: sha256(root)}
        names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return {n.as_posix(): sha256(root / n) for n in names if not any(part.startswith(".") for part in n.parts)}
    return hash_list([Path(path) for path in source])


def hash_list(files: list[Path]) -> dict[str, str]:
    unique = len({file.name for file in files}) == len(files)
    return {file.name if unique else f"{file.parent.name}/{file.name}": sha256(file) for file in files}


def verify(folder: str | Path, manifest: Mapping[str, str]) -> list[str]:
    """One line for each file of ``manifest`` (name -> SHA-256) that is missing or differs, and each extra file."""
    root, problems = Path(folder), []
    for name, wanted in sorted(manifest.items()):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{name}: leaves the folder")
        elif not (root / name).is_file():
            problems.append(f"{name}: missing")
        elif (got := sha256(root / name)) != wanted.lower():
            problems.append(f"{name}: SHA-256 is {got[:12]}..., the manifest says {wanted[:12]}...")
    present = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    extra = {n.as_posix() for n in present if not any(part.startswith(".") for part in n.parts)} - manifest.keys()
    return problems + [f"{name}: not in the manifest" for name in sorted(extra)]
