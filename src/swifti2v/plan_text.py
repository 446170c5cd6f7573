"""A plan in words: the cells of its table and numbers that people read. Knows nothing of what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Row


def line(row: tuple[str, ...], widths: list[int]) -> str:
    """One line of the table: the first cell to the left, the others to the right."""
    first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *others])


def cells(row: Row) -> tuple[str, ...]:
    """A phase as text."""
    return (
        row.phase,
        str(row.windows or "-"),
        f"{row.tokens:,}" if row.tokens else "-",
        str(row.forwards or "-"),
        scaled(row.flops, "FLOP") if row.flops else "-",
        scaled(row.weight_bytes, "B") if row.weight_bytes else "-",
        scaled(row.activation_bytes, "B") if row.activation_bytes else "-",
        "-" if row.seconds is None else f"{row.seconds:.1f}",
    )


def scaled(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 7010000000000000 FLOP is 7.01 PFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """12 s, or 3 min 05 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
