"""Rows of other toolkits: the same layers, calibration inputs, noise and images as the other rows.

A peer has no plan of ours, hence no search and no compiled graph: its run folder holds quality.json
and the samples only.
"""

import hashlib
import json
import time
from collections.abc import Callable

from treeq_export import __version__
from treeq_export.artefacts import sha256_of_file
from treeq_export.compare.rows import QUALITY_FILE, read_quality, score_fields
from treeq_export.environment import version_of
from treeq_export.evaluate.stage import run_evaluate
from treeq_export.model.layers import discover_linears
from treeq_export.model.trajectories import collect_rows
from treeq_export.model.zoo import Denoiser
from treeq_export.peers import PEERS, quantize_with_peer
from treeq_export.pipeline.run import recipe_with_digests
from treeq_export.pipeline.workspace import StageRecord, Workspace
from treeq_export.records import CompareRow
from treeq_export.runners.torch_runner import TorchRunner
from treeq_export.search.network import select_linears

CALIBRATE, EVALUATE = "calibrate", "evaluate"
FLOAT_BITS = 32

OnStage = Callable[[str], Callable[[float], None]]


def peer_folder(name: str) -> str:
    """Return the name of a peer's folder below DIR/cells."""
    return f"peer-{name}"


def is_peer_finished(run: Workspace, name: str) -> bool:
    """Whether a peer's images have been measured with this recipe and this toolkit."""
    record = run.stages.get(EVALUATE)
    path = run.run / QUALITY_FILE
    return (
        record is not None
        and record.fingerprint == _fingerprint(run, name)
        and path.is_file()
        and sha256_of_file(path) == record.outputs.get(QUALITY_FILE)
    )


def run_peer(run: Workspace, name: str, on_stage: OnStage) -> bool:
    """Quantize with a peer and measure its images, unless that is done.

    Args:
        run: The peer's folder, with the recipe that all cells share.
        name: One of `PEERS`.
        on_stage: Opens a stage's bar.

    Returns:
        Whether there was anything to do.

    Raises:
        RunnerError: The toolkit is not installed, or did not quantize these layers.
        TreeqError: Whatever evaluate raises.
    """
    if is_peer_finished(run, name):
        return False
    run.save()
    key = _fingerprint(run, name)
    started = time.monotonic()
    quantized = _quantize(run, name, on_stage(CALIBRATE))
    calibrated = time.monotonic()
    with TorchRunner(quantized) as runner:
        run_evaluate(
            run.run,
            run.denoiser,
            runner,
            run.recipe,
            on_step=on_stage(EVALUATE),
            fp_samples=run.fp_samples,
            source=key,
            say=run.say,
        )
    done = time.monotonic()
    outputs = {QUALITY_FILE: sha256_of_file(run.run / QUALITY_FILE)}
    seconds = (round(calibrated - started, 3), round(done - calibrated, 3))
    run.stages = {
        CALIBRATE: StageRecord(fingerprint=key, seconds=seconds[0], outputs={}),
        EVALUATE: StageRecord(fingerprint=key, seconds=seconds[1], outputs=outputs),
    }
    run.save()
    return True


def _quantize(run: Workspace, name: str, on_step: Callable[[float], None]) -> Denoiser:
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


def make_peer_row(run: Workspace, name: str) -> CompareRow:
    """Return the row of a finished peer.

    Raises:
        PlanError: Its quality.json is malformed.
    """
    peer = PEERS[name]
    activation = "fp" if peer.activation_bits == FLOAT_BITS else peer.activation_bits
    return CompareRow(
        name=peer_folder(name),
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


def _fingerprint(run: Workspace, name: str) -> str:
    """Return the digest of everything that a peer's images depend on."""
    recipe = recipe_with_digests(run)
    sections = ("model", "sampler", "calibrate", "evaluate", "seed")
    depends = {
        "version": __version__,
        "peer": [name, version_of("nvidia-modelopt"), repr(PEERS[name])],
        "exclude": recipe["search"]["exclude"],
        "recipe": [recipe[section] for section in sections],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
