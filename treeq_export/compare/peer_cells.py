"""Rows of other toolkits: the same layers, calibration inputs, noise and images as the other rows.

A peer has no plan of ours, hence no search and no compiled graph: its run folder holds quality.json
and the samples only. It is no stage of the pipeline, because its quantized model is in memory only;
its digest stands in run.json as a stage's does.
"""

import time
from dataclasses import dataclass

from treeq_export import __version__
from treeq_export.artefacts import digest_of, sha256_of_file
from treeq_export.compare.cells import StartStage
from treeq_export.compare.rows import read_quality, score_fields
from treeq_export.environment import version_of
from treeq_export.evaluate.stage import run_evaluate
from treeq_export.model.layers import discover_linears
from treeq_export.model.trajectories import collect_rows
from treeq_export.model.zoo import Denoiser
from treeq_export.peers import PEERS, quantize_with_peer
from treeq_export.pipeline.run import recipe_with_digests
from treeq_export.pipeline.workspace import StageRecord, Workspace
from treeq_export.progress import OnStep
from treeq_export.recipe import Recipe
from treeq_export.records import CompareRow
from treeq_export.run_folder import RunFolder
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.search.network import select_linears

CALIBRATE, EVALUATE = "calibrate", "evaluate"
FLOAT_BITS = 32


@dataclass(frozen=True)
class PeerCell:
    """A cell of another toolkit.

    Attributes:
        peer: One of `peers.PEERS`.
        recipe: The recipe that all cells share.
    """

    peer: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its folder below DIR/cells."""
        return f"peer-{self.peer}"

    def is_finished(self, run: Workspace) -> bool:
        """Whether the peer's images have been measured with this recipe and this toolkit."""
        record = run.stages.get(EVALUATE)
        path = run.run / RunFolder.QUALITY
        return (
            record is not None
            and record.fingerprint == _fingerprint(run, self.peer)
            and path.is_file()
            and sha256_of_file(path) == record.outputs.get(RunFolder.QUALITY)
        )

    def work(self, run: Workspace, start_stage: StartStage) -> bool:
        """Quantize with the peer and measure its images; return False if that was done already.

        Raises:
            RunnerError: The toolkit is not installed, or did not quantize these layers.
            TreeqError: Whatever evaluate raises.
        """
        if self.is_finished(run):
            return False
        run.save()
        key = _fingerprint(run, self.peer)
        started = time.monotonic()
        quantized = _quantize(run, self.peer, start_stage(CALIBRATE))
        calibrated = time.monotonic()
        with TorchRunner(quantized) as runner:
            run_evaluate(
                run.run,
                run.denoiser,
                runner,
                run.recipe,
                on_step=start_stage(EVALUATE),
                fp_samples=run.fp_samples,
                source=key,
                say=run.say,
            )
        done = time.monotonic()
        outputs = {RunFolder.QUALITY: sha256_of_file(run.run / RunFolder.QUALITY)}
        seconds = (round(calibrated - started, 3), round(done - calibrated, 3))
        run.stages = {
            CALIBRATE: StageRecord(fingerprint=key, seconds=seconds[0], outputs={}),
            EVALUATE: StageRecord(fingerprint=key, seconds=seconds[1], outputs=outputs),
        }
        run.save()
        return True

    def make_row(self, run: Workspace) -> CompareRow:
        """Return the row of the finished cell.

        Raises:
            PlanError: A peer's quality.json is malformed.
        """
        peer = PEERS[self.peer]
        activation = "fp" if peer.activation_bits == FLOAT_BITS else peer.activation_bits
        return CompareRow(
            name=self.name,
            strategy=peer.label,
            variant="ptq",
            peer=True,
            description=f"W{peer.weight_bits} A{activation}",
            budget=None,
            weight_bits=peer.weight_bits,
            activation_bits=peer.activation_bits,
            branch_parameter_fraction=None,
            seconds={stage: record.seconds for stage, record in run.stages.items()},
            num_evaluations=None,
            front=[],
            **score_fields(read_quality(run)),
        )


def _quantize(run: Workspace, name: str, on_step: OnStep) -> Denoiser:
    recipe = run.recipe
    linears = select_linears(discover_linears(run.denoiser), recipe.search.exclude)
    rows = collect_rows(
        run.denoiser,
        recipe.sampler,
        num_samples=recipe.calibrate.num_samples,
        num_rows=recipe.calibrate.num_rows,
        seed=recipe.seed,
        on_step=lambda done: on_step(0.5 * done),
    )
    quantized = quantize_with_peer(name, run.denoiser, [linear.name for linear in linears], rows)
    on_step(1.0)
    return quantized


def _fingerprint(run: Workspace, name: str) -> str:
    """Return the digest of everything that a peer's images depend on."""
    recipe = recipe_with_digests(run)
    sections = ("model", "sampler", "calibrate", "evaluate", "seed")
    return digest_of(
        version=__version__,
        peer=[name, version_of("nvidia-modelopt"), repr(PEERS[name])],
        exclude=recipe["search"]["exclude"],
        recipe=[recipe[section] for section in sections],
    )
