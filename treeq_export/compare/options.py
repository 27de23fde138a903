"""What a comparison is made of, and its options as they are written on the command line."""

import math
import shlex
from collections.abc import Callable, Sequence
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
        seeds: Of the images; None takes the recipe's.
    """

    budgets: tuple[float, ...]
    strategies: tuple[str, ...]
    variants: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


def command_line(options: CompareOptions, recipe: str, overrides: Sequence[str], out: Path) -> str:
    """Return the command line that repeats a comparison, with the folder's name only."""
    words = ["treeq-export", "compare", recipe]
    words += ["--budgets", ",".join(f"{budget:g}" for budget in options.budgets)]
    words += ["--strategies", ",".join(options.strategies)]
    lists = {
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


def split_list(text: str) -> list[str]:
    """Return the words of a comma-separated list, each once.

    Raises:
        ValueError: There is none.

    >>> split_list("tss, uniform,tss")
    ['tss', 'uniform']
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError("received an empty list, expected words separated by commas")
    return words


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return average bits.

    Raises:
        ValueError: One is not a number, or not within the bits that a layer can have.

    >>> parse_budgets("2.5,3")
    (2.5, 3.0)
    """
    budgets: list[float] = []
    for word in split_list(text):
        try:
            budget = float(word)
        except ValueError:
            budget = math.nan
        if not MIN_BITS <= budget <= MAX_BITS:
            raise ValueError(
                f"received {word!r}, expected average bits from {MIN_BITS} to {MAX_BITS}, "
                "such as 2.5,3,4"
            )
        budgets.append(budget)
    return tuple(dict.fromkeys(budgets))


def parse_names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return names out of a list of known ones.

    Raises:
        ValueError: One is not known.
    """
    words = split_list(text)
    for word in words:
        if word not in known:
            raise ValueError(f"received {word!r}, expected some of {', '.join(known)}")
    return tuple(words)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return seeds.

    Raises:
        ValueError: One is not an integer from 0 on.

    >>> parse_seeds("0,1,2")
    (0, 1, 2)
    """
    words = split_list(text)
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise ValueError(f"received {word!r}, expected integers from 0 on, such as 0,1,2")
    return tuple(int(word) for word in words)


def parse_peers(text: str) -> tuple[str, ...]:
    """Return names of peers.

    Raises:
        ValueError: One is not known.
    """
    from treeq_export.peers import PEERS  # with PyTorch, which the other options do not need

    return parse_names(text, tuple(PEERS))


PARSERS: dict[str, Callable[[str], Any]] = {
    "budgets": parse_budgets,
    "strategies": lambda text: parse_names(text, STRATEGIES),
    "variants": lambda text: parse_names(text, VARIANTS),
    "seeds": parse_seeds,
    "peers": parse_peers,
}
