"""What a comparison is made of, and its options as they are written on the command line."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from treeq_export.ops import MAX_BITS, MIN_BITS
from treeq_export.recipe import SearchSection

STRATEGIES: tuple[str, ...] = get_args(SearchSection.model_fields["strategy"].annotation)
VARIANTS = ("none", "peft", "qat")
MIN_SEEDS = 3  # fewer give no spread worth printing


@dataclass(frozen=True)
class CompareOptions:
    """Which cells a comparison has: every strategy at every budget, with every variant.

    Attributes:
        budgets: Average bits of weights and of activations.
        strategies: Names of search strategies.
        variants: Modes of finetune beside "none", which always comes first.
        peers: Names of other toolkits' methods, one row each.
        seeds: Seeds of the images; None takes the recipe's.
    """

    budgets: tuple[float, ...]
    strategies: tuple[str, ...]
    variants: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


def command_line(options: CompareOptions, recipe: str, overrides: Sequence[str], out: Path) -> str:
    """Return the command line that repeats a comparison, with the folder's name only."""
    words = ["treeq-export", "compare", recipe]
    lists = {
        "--budgets": [f"{budget:g}" for budget in options.budgets],
        "--strategies": options.strategies,
        "--finetune": options.variants,
        "--peers": options.peers,
        "--seeds": options.seeds or (),
    }
    for flag, values in lists.items():
        if values:
            words += [flag, ",".join(map(str, values))]
    words += ["--out", out.absolute().name]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def _parse(text: str, read: Callable[[str], Any], expected: str) -> tuple[Any, ...]:
    """Return the values of a comma-separated list, each once.

    Args:
        text: The list.
        read: Returns a word's value, None for a word that has none.
        expected: Description of the words, for the message.

    Raises:
        ValueError: The list is empty, or a word has no value.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("received an empty list, expected words separated by commas")
    values = {word: read(word) for word in words}
    for word, value in values.items():
        if value is None:
            raise ValueError(f"received {word!r}, expected {expected}")
    return tuple(dict.fromkeys(values.values()))


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return average bits; a ValueError names one that no layer can have.

    >>> parse_budgets("2.5,3")
    (2.5, 3.0)
    """

    def read(word: str) -> float | None:
        with suppress(ValueError):
            if MIN_BITS <= float(word) <= MAX_BITS:
                return float(word)
        return None

    return _parse(text, read, f"average bits from {MIN_BITS} to {MAX_BITS}, such as 2.5,3,4")


def parse_names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return names out of a list of known ones; a ValueError names one that is unknown.

    >>> parse_names("tss, uniform,tss", STRATEGIES)
    ('tss', 'uniform')
    """
    read = {name: name for name in known}.get
    return _parse(text, read, f"some of {', '.join(known)}")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return seeds; a ValueError names a word that is no integer from 0 on.

    >>> parse_seeds("0,1,2")
    (0, 1, 2)
    """

    def read(word: str) -> int | None:
        return int(word) if word.isascii() and word.isdigit() else None

    return _parse(text, read, "integers from 0 on, such as 0,1,2")


def parse_peers(text: str) -> tuple[str, ...]:
    """Return names of peers; a ValueError names one that is unknown."""
    from treeq_export.peers import PEERS  # with PyTorch, which the other options do not need

    return parse_names(text, tuple(PEERS))


PARSERS: dict[str, Callable[[str], Any]] = {
    "budgets": parse_budgets,
    "strategies": lambda text: parse_names(text, STRATEGIES),
    "variants": lambda text: parse_names(text, VARIANTS),
    "seeds": parse_seeds,
    "peers": parse_peers,
}
