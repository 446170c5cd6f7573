"""Names of output files: checked before work begins, reserved, and published whole without overwriting.

While ``NAME.mp4`` is being made it is ``NAME.part.mp4``; a folder of pictures ``NAME`` is ``NAME.part``.
An empty part is a reservation: whoever created it owns the name. Knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from .core import RunError, UsageError

try:
    import fcntl
except ImportError:  # Windows: reservations still hold, but a stale part is not told from a live one
    fcntl = None  # type: ignore[assignment]

VIDEO_SUFFIXES = (".mp4", ".m4v")
_LONGEST_ADDITION = len("_0001.part.remux")


def part_path(target: Path) -> Path:
    """Where ``target`` is while it is made: ``clip.mp4`` -> ``clip.part.mp4``, a folder ``clip`` -> ``clip.part``."""
    return target.with_name(f"{target.stem}.part{target.suffix}")


def unique_path(path: str | Path) -> Path:
    """``path``, or the first of ``NAME_0001``, ``NAME_0002``... that is free, reserved for this caller.

    The reservation is an empty part file (an empty part folder if the name has no suffix), created atomically,
    so two processes never get the same name. ``write_video`` consumes it; ``release`` gives it back.
    """
    path = Path(path)
    check_writable(path)
    for number in range(10_000):
        candidate = path.with_name(f"{path.stem}_{number:04d}{path.suffix}") if number else path
        if os.path.lexists(candidate) or not _reserve(candidate):
            continue
        # Another run may have published this name between our look and our reservation.
        if os.path.lexists(candidate):
            release(candidate)
            continue
        return candidate
    raise UsageError(f"{path}: 9,999 files of this name exist; choose another name")


def release(target: str | Path) -> None:
    """Give an unused reservation back. A part that holds anything is left alone."""
    part = part_path(Path(target))
    with suppress(FileNotFoundError):
        if part.is_dir():
            with suppress(OSError):  # not empty
                part.rmdir()
        elif part.stat().st_size == 0:
            part.unlink()


def check_writable(target: str | Path, bytes_needed: int = 0) -> None:
    """Refuse, as ``UsageError``, an output that could not be written: folder, name, extension, free space.

    ``target`` is a video (.mp4, .m4v) or, without a suffix, a folder of pictures; it may exist (see
    ``unique_path``). The final remux holds the video twice for a moment, so count its size twice.
    """
    target = Path(target)
    if "\x00" in str(target):
        raise UsageError(f"output {str(target)!r} holds a NUL character; choose another name")
    folder = target.parent
    try:
        _check_name(target)
        if not folder.exists():
            raise UsageError(f"output folder {folder} does not exist; create it or choose another")
        if not folder.is_dir():
            raise UsageError(f"output folder {folder} is a file; choose a folder")
        longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        room = longest - _LONGEST_ADDITION
        length = len(os.fsencode(target.name))
        if length > room:
            raise UsageError(f"output name is {length} bytes long; at most {room} leave room for the part file")
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"cannot write {_brief(target)}: {error.strerror or error}") from None
    except UnicodeEncodeError:
        raise UsageError(f"output {str(target)!a} is not a valid file name; re-type it") from None
    if free < bytes_needed:
        raise UsageError(
            f"{folder} has {free / 2**20:,.0f} MiB free and {bytes_needed / 2**20:,.0f} MiB are needed; "
            "free space or choose another folder"
        )


@contextmanager
def locked_part(target: Path) -> Iterator[FileIO]:
    """The part file of ``target``, open for unbuffered writing and locked; removed at the end if it is still empty.

    Raises ``UsageError`` if another process is writing it. A part left by a killed process is taken over.
    """
    part = part_path(target)
    try:
        file = open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"cannot write {_brief(part)}: {error.strerror or error}") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UsageError(f"cannot lock {part}: {error.strerror}") from None
                raise UsageError(f"{part} is being written by another process; choose another name") from None
            if not _is_still(file, part):
                raise UsageError(f"{target} was finished by another process just now; choose another name")
        try:
            yield file
        finally:
            # The part may be published by now and its name reserved by someone else: look at our own file.
            if os.fstat(file.fileno()).st_size == 0 and _is_still(file, part):
                part.unlink()


def publish(made: Path, target: Path) -> None:
    """Give the finished file ``made`` the name ``target``, never overwriting: ``RunError`` if it exists by now."""
    taken = RunError(f"{target} appeared while it was being made and is not overwritten; the video is in {made}")
    try:
        os.link(made, target)
    except FileExistsError:
        raise taken from None
    except OSError:
        # A file system without hard links (FAT, some network shares): the part file still guards the name.
        if os.path.lexists(target):
            raise taken from None
        os.rename(made, target)
        return
    made.unlink()


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut, where the system lets a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_still(file: FileIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _check_name(target: Path) -> None:
    if target.name in ("", ".", ".."):
        raise UsageError(f"output {str(target)!r} names no file; give one such as clip.mp4")
    suffix = target.suffix.lower()
    if suffix and suffix not in VIDEO_SUFFIXES:
        raise UsageError(f"output {target.name} ends in {target.suffix}; use .mp4, or no extension for a PNG folder")
    if suffix and target.is_dir():
        raise UsageError(f"output {target} is a folder; give a file name such as {target}/clip.mp4")


def _reserve(candidate: Path) -> bool:
    part = part_path(candidate)
    try:
        if candidate.suffix:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        else:
            part.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot write {_brief(part)}: {error.strerror or error}") from None
    return True


def _brief(path: Path) -> str:
    """The path, shortened: one line, even for a name of thousands of characters."""
    text = str(path)
    return text if len(text) <= 160 else f"{text[:60]}...{text[-60:]}"
