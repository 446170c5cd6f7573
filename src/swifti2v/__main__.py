"""``python -m swifti2v``: the same as the ``swifti2v`` command."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
