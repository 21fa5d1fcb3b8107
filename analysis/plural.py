"""Numbers of things in sentences."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """`1 head`, `2 heads`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
