"""One search: what a worker needs to know, in any process, and what its values depend on.

A session is small and can be pickled: a Ray worker loads the checkpoint and opens the prepared
files itself. All processes use the same number of threads, so that they measure the same values.
"""

from dataclasses import dataclass
from pathlib import Path

from treeq_export import __version__
from treeq_export.artefacts import digest_of
from treeq_export.plan import LayerPlan
from treeq_export.recipe import Recipe
from treeq_export.search.formats import make_templates
from treeq_export.search.network import Network
from treeq_export.search.store import Store
from treeq_export.search.tree import Configuration, encode

_MEASURE = 3  # raised when the same key stands for another value (measure/)
_IGNORED = ("strategy", "budget", "noise", "keep", "refine", "executor", "num_workers")


@dataclass(frozen=True)
class Session:
    """A search that measures.

    Attributes:
        folder: `search/` of the run folder.
        recipe: The recipe.
        checkpoint_sha256: Digest of the checkpoint.
        network: The searched layers, with their branches.
        environment: The configuration of the noisy environment.
        batch_rows: Rows of one forward pass.
    """

    folder: Path
    recipe: Recipe
    checkpoint_sha256: str
    network: Network
    environment: Configuration
    batch_rows: int

    @property
    def store(self) -> Store:
        """The prepared files, for those who read them."""
        return Store(self.folder, "")

    @property
    def templates(self) -> tuple[LayerPlan, ...]:
        """One entry per layer, whose bits are placeholders."""
        return make_templates(self.network, self.recipe.search)

    @property
    def weights_fingerprint(self) -> str:
        """Digest of everything that rows, clean outputs and weights depend on."""
        recipe, branches = self.recipe, self.network.branches
        return digest_of(
            version=__version__,
            checkpoint=self.checkpoint_sha256,
            model=recipe.model.model_dump(mode="json", exclude={"checkpoint"}),
            sampler=recipe.sampler.model_dump(mode="json"),
            calibrate=recipe.calibrate.model_dump(mode="json"),
            seed=recipe.seed,
            search=recipe.search.model_dump(mode="json", exclude=set(_IGNORED)),
            branches={name: branch.model_dump() for name, branch in branches.items()},
        )

    def journal_fingerprint(self, noise: float) -> str:
        """Return the digest of everything that a measured value depends on beside its key."""
        return digest_of(
            weights=self.weights_fingerprint,
            noise=noise,
            environment=encode(self.environment) if noise else "",
            measure=_MEASURE,
        )
