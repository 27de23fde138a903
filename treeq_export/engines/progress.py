"""How far a build is, from the builder's nested phases or from how long the last one took."""

from dataclasses import dataclass, field

_LONGEST = 0.99  # a build that takes longer than the last one is never done


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    done: int = 0


@dataclass
class Phases:
    """The builder's open phases, as its progress monitor reports them.

    >>> phases = Phases()
    >>> phases.start("build", None, 2)
    >>> phases.step("build", 0)
    >>> phases.start("optimize", "build", 4)
    >>> phases.step("optimize", 0)
    >>> phases.fraction
    0.625
    """

    _open: dict[str, _Phase] = field(default_factory=dict[str, _Phase])
    _furthest: float = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """Open a phase within a step of another."""
        self._open[name] = _Phase(parent, max(num_steps, 1))

    def step(self, name: str, step: int) -> None:
        """Note that a step, counted from 0, is complete."""
        if name in self._open:
            self._open[name].done = step + 1

    def finish(self, name: str) -> None:
        """Close a phase."""
        self._open.pop(name, None)

    @property
    def fraction(self) -> float:
        """The part that is done, 0..1; it never falls."""
        share, total, parent = 1.0, 0.0, None
        for _ in range(len(self._open)):
            inner = [phase for phase in self._open.items() if phase[1].parent == parent]
            if not inner:
                break
            parent, phase = inner[-1]
            total += share * min(phase.done / phase.num_steps, 1.0)
            share /= phase.num_steps
        self._furthest = max(self._furthest, min(total, 1.0))
        return self._furthest


def estimate(fraction: float, elapsed_s: float, expected_s: float | None) -> float:
    """Return the part that is done.

    Args:
        fraction: By the builder's phases, which are of very unequal length.
        elapsed_s: Since the build's start.
        expected_s: Seconds that a build of as many layers took; None where there was none.

    >>> estimate(0.6, 3.0, 12.0), estimate(0.6, 20.0, 12.0), estimate(0.6, 3.0, None)
    (0.25, 0.99, 0.6)
    """
    if expected_s is None:
        return min(fraction, _LONGEST)
    return min(elapsed_s / max(expected_s, 1e-3), _LONGEST)
