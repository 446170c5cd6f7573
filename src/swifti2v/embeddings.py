"""Text and image embeddings kept in a folder, by content: the same words to the same encoder are not encoded twice.

An entry's name is a hash of all that decides its bits: the words or pixels, the encoder's weight files, dtype, device,
threads, processor and library versions. A file appears whole or not at all; one that is damaged is reported and made
again; the oldest leave when the folder outgrows its bound. Whoever asks says how to make what is not there, so that an
encoder whose answers are all kept need not be loaded. This module knows no encoders and no pipelines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .core import UsageError
from .machine import cpu_name

MAX_BYTES = 2 << 30
"""Some 480 prompts of Wan's (4 MiB each)."""
STALE_SECONDS = 3600
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.\d+\.tmp")
_SETTINGS = ("dtype", "threads")
_TEXT, _IMAGE = ("text_encoder", "tokenizer"), ("image_encoder", "image_processor")

Make = Callable[[], Tensor]


def check_folder(folder: Path) -> None:
    """UsageError unless ``folder`` is, or can become, a folder that can be written to. Makes nothing."""
    name = repr(str(folder) if len(str(folder)) <= 80 else f"{str(folder)[:40]}...")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if _exists(path))
        if not there.is_dir():
            raise UsageError(f"cache {name}: {there.name} is not a folder; give a folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"cache {name} cannot be written to: {error.strerror or error}; give another folder") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cache {name} is not a valid name: {error}") from None


def _exists(path: Path) -> bool:
    """OSError, and ValueError, for a name that no file can have."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Embeddings:
    """The embeddings in ``folder``, of the encoders and under the settings that a pipeline's fingerprint names.

    ``found``: ``fingerprint``'s ``model_hashes``, ``versions`` and ``settings``. ``tell`` is given a line for every
    entry that could not be used or kept. Several processes may share a folder.
    """

    def __init__(
        self,
        folder: Path,
        found: Mapping[str, Mapping[str, str]],
        tell: Callable[[str], None],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folder, self.max_bytes, self._tell = folder, max_bytes, tell
        self._device = torch.device(found["settings"].get("device", "cpu"))
        self._hashes = found["model_hashes"]
        on_gpu = self._device.type == "cuda" and torch.cuda.is_available()
        self._base = {
            "processor": torch.cuda.get_device_name(self._device) if on_gpu else cpu_name(),
            "device": self._device.type,
            "versions": dict(found["versions"]),
            **{name: found["settings"].get(name, "") for name in _SETTINGS},
        }

    def text(self, prompt: str, tokens: int, make: Make) -> Tensor:
        """The states of a prompt cut to ``tokens``: as kept, bit for bit, or what ``make`` gives, kept from now on."""
        return self._get(self._text_key(prompt, tokens), "text", make)

    def image(self, photo: Tensor, make: Make) -> Tensor:
        """The same for the states of a photo's pixels."""
        return self._get(self._image_key(photo), "image", make)

    def holds_text(self, prompt: str, tokens: int) -> bool:
        """Whether ``text`` would not have to make it (unless the entry turns out damaged)."""
        return self._path(self._text_key(prompt, tokens)).is_file()

    def holds_image(self, photo: Tensor) -> bool:
        return self._path(self._image_key(photo)).is_file()

    def _text_key(self, prompt: str, tokens: int) -> str:
        return self._key({"kind": "text", "prompt": prompt, "tokens": tokens}, _TEXT)

    def _image_key(self, photo: Tensor) -> str:
        return self._key({"kind": "image", "pixels": _digest(photo), "shape": list(photo.shape)}, _IMAGE)

    def _key(self, what: dict[str, object], parts: tuple[str, ...]) -> str:
        weights = {name: digest for name, digest in self._hashes.items() if set(parts) & set(name.split("/"))}
        if not weights:
            raise ValueError(f"the files of {parts[0]} are not hashed: nothing says whose embeddings these would be")
        return hashlib.sha256(json.dumps(what | self._base | {"weights": weights}, sort_keys=True).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _get(self, key: str, what: str, make: Make) -> Tensor:
        path = self._path(key)
        if path.is_file():
            try:
                return _read(path).to(self._device)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:120]
                self._tell(f"a kept {what} embedding is damaged and is made again: {path.name[:12]}...: {reason}")
        made = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, made)
            self._make_room(path)
        except OSError as error:
            self._tell(f"the {what} embedding could not be kept in {self.folder.name}: {error.strerror or error}")
        return made

    def _make_room(self, newest: Path) -> None:
        """Remove the oldest entries until the rest fits, and what killed processes left."""
        entries = []
        for item in os.scandir(self.folder):
            if _ENTRY.fullmatch(item.name):
                entries.append((item.stat().st_mtime, item.name, item.stat().st_size))
            elif _TEMPORARY.fullmatch(item.name) and time.time() - item.stat().st_mtime > STALE_SECONDS:
                (self.folder / item.name).unlink(missing_ok=True)
        total = sum(size for _, _, size in entries)
        for _, name, size in sorted(entries):
            if total <= self.max_bytes:
                return
            if name != newest.name or size > self.max_bytes:
                (self.folder / name).unlink(missing_ok=True)
                total -= size


def _read(path: Path) -> Tensor:
    """An entry's states. ValueError if they are not what was written."""
    with safe_open(path, framework="pt") as file:
        states, metadata = file.get_tensor("states"), file.metadata() or {}
    if metadata.get("sha256") != _digest(states):
        raise ValueError("its checksum differs")
    return states


def _write(path: Path, states: Tensor) -> None:
    held = states.detach().cpu().contiguous()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save({"states": held}, {"sha256": _digest(held)}))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    return hashlib.sha256(held.flatten().view(torch.uint8).numpy().data).hexdigest()
