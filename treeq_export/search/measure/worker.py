"""The worker of a search: it hands each task to the measurement that the task's node names."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.zoo import Denoiser
from treeq_export.search.executor import Task
from treeq_export.search.measure.blocks import PreparedBlocks
from treeq_export.search.measure.segment import LeafAlone, Segment
from treeq_export.search.measure.whole import FinalInputs, WholeNetwork
from treeq_export.search.session import Session
from treeq_export.search.tree import Configuration, decode, walk


class Measurement(Protocol):
    """One kind of measurement, of one node of the tree or of the whole network."""

    def measure(
        self, prefix: Configuration, suffixes: Sequence[Configuration], /
    ) -> Iterator[float]:
        """Yield the mean squared error of every suffix, in order."""
        ...


class MeasuringWorker:
    """Measures tasks of a search. Call `close` when it is no longer needed.

    Args:
        session: The search, prepared.
        denoiser: The full-precision model; None loads the recipe's checkpoint.
    """

    def __init__(self, session: Session, denoiser: Denoiser | None = None) -> None:
        torch.set_num_threads(session.recipe.search.threads)
        if denoiser is None:
            model = session.recipe.model
            checkpoint = open_checkpoint(Path(model.checkpoint), model.variant)
            denoiser = make_denoiser(load_model(checkpoint), checkpoint, model)
        self._blocks = PreparedBlocks(session, denoiser)
        self._makers: dict[str, Callable[[], Measurement]] = {
            node.name: partial(Segment if node.children else LeafAlone, self._blocks, node)
            for node, _ in walk(session.network.root)
        }
        for kind in (WholeNetwork, FinalInputs):
            self._makers[kind.NAME] = partial(kind, self._blocks)
        self._present = ""  # whose outputs are kept, until a task of another node comes
        self._measurement: Measurement | None = None

    def close(self) -> None:
        """Give the model back as it was."""
        self._blocks.close()

    @torch.no_grad()
    def measure(self, task: Task) -> Iterator[float]:
        """Yield the mean squared error of every suffix of a task, in order."""
        if self._measurement is None or task.node != self._present:
            self._measurement, self._present = self._makers[task.node](), task.node
        suffixes = [decode(suffix) for suffix in task.suffixes]
        yield from self._measurement.measure(decode(task.prefix), suffixes)
