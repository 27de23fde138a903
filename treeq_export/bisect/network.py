"""The first departure where a layer cannot be run alone: engines.

An engine gives out its network's outputs only, and another output inside would break its fusions.
So each question builds an engine of the graph up to one layer, as an engine's user would get it,
runs it and compares that layer's output. Layers whose output is inside a fused node cannot be
asked; their faults are found at the next layer that can.

Untested on a GPU. The search itself is tested with ONNX Runtime in the engine's place.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from treeq_export.artefacts import sha256_of_file
from treeq_export.bisect.departure import find_departure, layers_before
from treeq_export.bisect.own import BisectRecord
from treeq_export.engines.engine import ENGINE_FILE, BuildOrder, build_engine
from treeq_export.errors import RunnerError
from treeq_export.progress import OnStep
from treeq_export.quant.metrics import sqnr_db
from treeq_export.records import save_record
from treeq_export.run_folder import RunFolder
from treeq_export.runners.engine_manifest import MANIFEST_FILE, read_manifest
from treeq_export.runners.graph_meta import LayerSite, load_layers
from treeq_export.runners.reference_trace import Trace
from treeq_export.runners.tensorrt_runner import TensorrtRunner
from treeq_export.scratch import scratch_folder

ENGINES = f"{RunFolder.ENGINES}/"

# Runs a model on named inputs and returns its only output.
RunModel = Callable[[ir.Model, Mapping[str, Any]], NDArray[Any]]


def cut_prefix(model: ir.Model, site: LayerSite) -> ir.Model:
    """Return the graph up to a layer's output, which becomes its only output."""
    cut = model.clone()
    values = ir.convenience.create_value_mapping(cut.graph)
    cut.graph.outputs.clear()
    cut.graph.outputs.append(values[site.output])
    RemoveUnusedNodesPass()(cut)
    return cut


def bisect_network(
    name: str,
    model: ir.Model,
    sites: Sequence[LayerSite],
    trace: Trace,
    run_model: RunModel,
    min_sqnr_db: float,
    on_step: OnStep,
) -> BisectRecord:
    """Find the first layer that departs from the reference, running prefixes of the graph.

    Args:
        name: Name in the record.
        model: The compiled graph.
        sites: The graph's layers.
        trace: The reference's values.
        run_model: Runs a prefix.
        min_sqnr_db: Least SQNR of an output inside the network.
        on_step: Called with the fraction of the questions at most, 0..1.
    """
    asked = [site for site in sites if site.output]
    measured: dict[int, float] = {}

    def departs(index: int) -> bool:
        site = asked[index]
        output = run_model(cut_prefix(model, site), trace.inputs)
        measured[index] = sqnr_db(trace.layer_outputs[site.name], output)
        on_step(len(measured) / len(asked))
        return not measured[index] >= min_sqnr_db

    found = find_departure(layers_before(model, asked), departs)
    layer = None if found is None else asked[found].name
    reasons = []
    if found is not None:
        reasons = [f"inside the network {measured[found]:.1f} dB < {min_sqnr_db:g} dB"]
    return BisectRecord(
        target=name,
        layer=layer,
        reasons=reasons,
        parity=None,
        departed=layer,
        num_examined=len(measured),
        num_layers=len(sites),
        min_sqnr_db=min_sqnr_db,
    )


def bisect_engine(
    run: Path, name: str, trace: Trace, min_sqnr_db: float, on_step: OnStep
) -> BisectRecord:
    """Find the first departing layer of a built engine on this machine's GPU.

    Args:
        run: The run folder.
        name: "engines/<runtime>/<target>/<gpu>".
        trace: The reference's values.
        min_sqnr_db: Least SQNR of an output inside the network.
        on_step: Called with the fraction done.

    Raises:
        RunnerError: No such engine exists, or it cannot run here.
        PlanError: The engine's graph is missing, damaged or of another plan.
    """
    folder = run / name
    manifest = read_manifest(folder)
    model, sites = load_layers(run, manifest.target, trace.layer_outputs)
    ir.external_data.load_to_model(model)
    run_model = partial(run_as_engine, like=folder)
    return bisect_network(name, model, sites, trace, run_model, min_sqnr_db, on_step)


def run_as_engine(model: ir.Model, inputs: Mapping[str, Any], like: Path) -> NDArray[Any]:
    """Build an engine of a model as another one was built, and run it.

    Args:
        model: The model.
        inputs: Inputs by name; the model may read fewer.
        like: Folder of the engine whose runtime, GPU and profile are taken.

    Raises:
        RunnerError: The engine cannot be built, or cannot run here.
    """
    manifest = read_manifest(like)
    runtime: Any = manifest.runtime
    with scratch_folder() as folder:
        graph = folder / "model.onnx"
        ir.save(model, graph)
        order = BuildOrder(
            runtime=runtime,
            gpu=manifest.gpu,
            graph=str(graph),
            profile=manifest.profile,
            folder=str(folder),
        )
        try:
            build_engine(order, None, lambda _: None)
            engine = folder / ENGINE_FILE
            own = {"engine_sha256": sha256_of_file(engine), "engine_bytes": engine.stat().st_size}
            save_record(folder / MANIFEST_FILE, manifest.model_copy(update=own))
            with TensorrtRunner(folder, runtime, use_graphs=False) as runner:
                return runner.run(inputs)
        except RunnerError as error:
            # The folder is a temporary one: name the engine that was asked for.
            raise RunnerError(str(error).replace(str(folder), str(like))) from error
