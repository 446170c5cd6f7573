"""The weights that ship with the package: listed, and compared with the checksums recorded at release."""

from __future__ import annotations

import json
from pathlib import Path

from . import presets
from .checkpoints import hash_files, verify
from .core import UsageError
from .presets import Preset

MANIFEST = "manifest.json"


def rows() -> list[list[str]]:
    """For every preset: name, whether weights are here, where they come from, what it is."""
    return [
        [preset.name, _state(preset), _source(preset), preset.title]
        for preset in presets.PRESETS.values()
        if not preset.hidden
    ]


def verify_shipped() -> int:
    """The number of shipped weight files, all as recorded. Raises UsageError naming the first that is not."""
    return sum(_verified(folder) for folder in _folders())


def _verified(folder: Path) -> int:
    problems = verify(folder, _recorded(folder))
    problems = [line for line in problems if line.split(":")[0] != MANIFEST]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(f"{folder.name} is not as shipped: {problems[0]}{more}; install swifti2v again")
    return len(_recorded(folder))


def write_manifest() -> int:
    """Record the checksums of the weights as they are now (for a release); returns how many."""
    count = 0
    for folder in _folders():
        hashes = {name: digest for name, digest in hash_files(folder).items() if name != MANIFEST}
        (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
        count += len(hashes)
    return count


def _folders() -> list[Path]:
    """The folders of weights in this package."""
    known = [(preset.name, preset.folder) for preset in presets.PRESETS.values() if preset.folder is not None]
    for name, folder in known:
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"this installation has no weights of {name}; install swifti2v again")
    return [folder for _, folder in known]


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return {str(name): str(digest) for name, digest in json.loads((folder / MANIFEST).read_text()).items()}
    except (OSError, ValueError, AttributeError):
        raise UsageError(f"{folder.name}/{MANIFEST} is missing or damaged; install swifti2v again") from None


def _state(preset: Preset) -> str:
    if preset.folder is not None:
        return "here" if (preset.folder / "model_index.json").is_file() else "missing"
    if preset.family == "mobile":
        return "not here"
    found = [_in_cache(name) for name in dict.fromkeys((preset.stage_one, preset.stage_two))]
    return "in the hub's cache" if all(found) else "partly in the hub's cache" if any(found) else "not here"


def _in_cache(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, "model_index.json"), str)


def _source(preset: Preset) -> str:
    if preset.folder is not None:
        return "this package"
    if preset.family == "mobile":
        return "the authors' checkpoint, converted: --model TRANSFORMER,LTX_VAE"
    if preset.family == "wan":
        return "not public yet: --model FOLDER"
    return f"huggingface.co: {preset.stage_one}, {preset.stage_two}"
