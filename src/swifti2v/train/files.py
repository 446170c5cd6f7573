"""Files that are there whole or not at all, also after a power cut. Knows bytes and JSON, nothing of what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..core import RunError


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; it takes the name ``path`` at the end, replacing what was there, or leaves nothing.

    RunError if the disk is full or the folder cannot be written. The temporary name holds the process number, so that
    two processes making the same file do not write into one another.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error}); what is finished is kept") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON, one element of a top-level list or object a line."""
    with written(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
