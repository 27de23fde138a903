"""What reaches a terminal: texts of files and servers, without what would steer it."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


def printable(text: str) -> str:
    r"""Return a text with its control characters written as escapes; line ends stay.

    Example:
        >>> printable("\x1b[31mred\x07")
        '\\x1b[31mred\\x07'
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text
    )


class SafeConsole(Console):
    """A console whose texts hold neither commands for the terminal nor rich's markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render, with the control characters of texts as escapes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
