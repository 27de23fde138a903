"""What a caller may be told while work goes on."""

from collections.abc import Callable

# Called with the fraction done, 0..1.
OnStep = Callable[[float], None]
# Called with a line that a person should know.
Say = Callable[[str], None]


def no_progress(_fraction: float) -> None:
    """Drop the fraction done."""


def say_nothing(_line: str) -> None:
    """Drop a line for people."""
