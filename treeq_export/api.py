"""The door for programs: quantize a network in memory.

    from treeq_export import api

    model = api.load(transformer)                      # a diffusers network, or a folder
    quantized = api.calibrate(api.search(model, weight_bits=4))
    graph = api.compile(quantized, "ort", "model.onnx")
    parity = api.validate(quantized, graph)

Every function takes the keys of its section of the recipe as keywords and returns a new object;
what it was given stays as it is. `on_step` is called with the fraction done, `say` with a line that
a person should know; both may be left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from treeq_export.artefacts import atomic_path, link_or_copy, put_in_place
from treeq_export.compile.export import export_graph
from treeq_export.compile.stage import lower_graph, save_model, write_graph
from treeq_export.errors import PlanError, RecipeError
from treeq_export.finetune.stage import train
from treeq_export.model.checkpoint import Checkpoint, load_model, open_checkpoint, open_module
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.fit_plan import fit_plan
from treeq_export.model.pipeline_scheduler import check_scheduler, resolve_scheduler
from treeq_export.model.quantized import quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors, load_plan, load_tensors, save_plan, tensors_digest
from treeq_export.progress import OnStep, Say, no_progress, say_nothing
from treeq_export.recipe import Recipe, change_section, make_recipe
from treeq_export.records import AuditLayer, FinetuneRecord, ParityRecord, SearchRecord
from treeq_export.run_folder import RunFolder
from treeq_export.runners.model_files import model_files
from treeq_export.scratch import scratch_folder
from treeq_export.search.stage import find_plan
from treeq_export.targets.names import TargetName
from treeq_export.validate.stage import run_validate


@dataclass(frozen=True)
class Model:
    """A full-precision network, and how it is called and sampled.

    Attributes:
        denoiser: The network behind the calling convention of all families.
        checkpoint: Class, configuration and digest of the network.
        recipe: The settings so far; sections that nothing has set have their defaults.
    """

    denoiser: Denoiser
    checkpoint: Checkpoint
    recipe: Recipe

    def changed(self, section: str, values: Mapping[str, Any]) -> "Model":
        """Return the model with some keys of one section of its recipe replaced.

        Raises:
            RecipeError: An unknown key, or a value out of range.
        """
        return replace(self, recipe=change_section(self.recipe, section, values))


@dataclass(frozen=True)
class Quantized:
    """A quantized network.

    Attributes:
        model: The full-precision network, with the settings that led here.
        plan: The format of every quantized layer.
        tensors: Codes, scales, biases and branch factors by "<layer>.<tensor>"; empty before
            `calibrate`.
        searched: Record of the search; None for a plan that was loaded.
        trained: Record of the training; None where nothing was trained.
    """

    model: Model
    plan: Plan
    tensors: Tensors
    searched: SearchRecord | None = None
    trained: FinetuneRecord | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The fake-quantized network, which computes in floating point what a target computes.

        Its attribute `model` is the diffusers network, ready for a pipeline.

        Raises:
            PlanError: Nothing was calibrated, or the plan does not fit the network.
        """
        self.check_calibrated()
        return quantize_model(self.model.denoiser, self.plan, self.tensors)

    def check_calibrated(self) -> None:
        """Check that the plan has tensors.

        Raises:
            PlanError: It has none.
        """
        if not self.tensors:
            raise PlanError("the plan has no scales and codes. Call api.calibrate first.")

    def save(self, folder: str | Path) -> "Quantized":
        """Write plan.json and plan.safetensors; return what `open_quantized` reads from them.

        Raises:
            OutputError: The folder cannot be written to.
        """
        return replace(self, plan=save_plan(Path(folder), self.plan, self.tensors or None))


@dataclass(frozen=True)
class Graph:
    """A compiled graph.

    Attributes:
        target: The kind of graph, such as "ort".
        model: The graph in memory.
        audit: The nodes that every quantized layer became.
        path: The file, where one was asked for.
    """

    target: TargetName
    model: ir.Model
    audit: Sequence[AuditLayer]
    path: Path | None = None


def load(
    source: str | Path | nn.Module,
    *,
    name: str = "model",
    seed: int = 0,
    sampler: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Model:
    """Open a network of one of the families.

    Args:
        source: A diffusers network in memory, which is left as it is; or a checkpoint's folder or
            original DiT `.pt` file.
        name: The name in the plan.
        seed: The seed of everything that is drawn at random.
        sampler: Keys of the recipe's section `sampler`.
        **settings: Keys of the recipe's section `model`, such as `latent_size`.

    Raises:
        CheckpointError: The network is of no family, or the files are not what they should be.
        RecipeError: A key is unknown or does not fit the network.
    """
    opened = None if not isinstance(source, nn.Module) else open_module(source)
    where = opened[0].path if opened else Path(str(source)).expanduser().absolute()
    section = {"checkpoint": str(where)} | settings
    values = {"name": name, "seed": seed, "model": section, "sampler": dict(sampler or {})}
    recipe = resolve_scheduler(make_recipe(values))
    check_scheduler(recipe)
    if opened is None:
        checkpoint = open_checkpoint(where, recipe.model.variant)
        opened = checkpoint, load_model(checkpoint)
    return Model(make_denoiser(opened[1], opened[0], recipe.model), opened[0], recipe)


def open_quantized(model: Model, folder: str | Path) -> Quantized:
    """Read a plan and its tensors, as `Quantized.save` or a run has written them.

    Raises:
        PlanError: The plan is missing, malformed or of another network.
    """
    plan = load_plan(Path(folder), model.checkpoint.sha256)
    tensors = {} if plan.tensors_sha256 is None else load_tensors(Path(folder), plan)
    return Quantized(model, plan, tensors)


def search(
    model: Model,
    *,
    folder: str | Path | None = None,
    on_step: OnStep = no_progress,
    say: Say = say_nothing,
    **settings: Any,
) -> Quantized:
    """Choose the formats of every layer.

    Args:
        model: The network.
        folder: Folder in which a search keeps what it has measured, so that the next one goes on
            from it; None measures in a temporary folder. Strategy "uniform" measures nothing.
        on_step: Called with the fraction done, 0..1.
        say: Called with what the search will cost.
        **settings: Keys of the recipe's section `search`, such as `strategy` and `budget`.

    Returns:
        The plan, without tensors.

    Raises:
        RecipeError: A key is unknown, or the budget cannot be met.
        FormatError: A format does not fit a layer.
    """
    model = model.changed("search", settings)
    denoiser, checkpoint, recipe = model.denoiser, model.checkpoint, model.recipe
    with scratch_folder() as scratch:
        run = scratch if folder is None else Path(folder)
        plan, record = find_plan(run, denoiser, checkpoint, recipe, on_step, say)
    return Quantized(model, plan, {}, searched=record)


def calibrate(quantized: Quantized, *, on_step: OnStep = no_progress, **settings: Any) -> Quantized:
    """Find codes, scales, biases and branch factors on trajectories of the network itself.

    Args:
        quantized: The result of `search`; the plan in it may have been changed.
        on_step: Called with the fraction done, 0..1.
        **settings: Keys of the recipe's section `calibrate`, such as `num_samples`.

    Raises:
        RecipeError: A key is unknown, or a value is out of range.
        PlanError: The plan does not fit the network.
    """
    model = quantized.model.changed("calibrate", settings)
    tensors, _ = fit_plan(model.denoiser, quantized.plan, model.recipe, on_step)
    plan = quantized.plan.model_copy(update={"tensors_sha256": tensors_digest(tensors)})
    return replace(quantized, model=model, plan=plan, tensors=tensors, trained=None)


def finetune(quantized: Quantized, *, on_step: OnStep = no_progress, **settings: Any) -> Quantized:
    """Train what was calibrated by distillation from full precision.

    Args:
        quantized: A calibrated network.
        on_step: Called with the fraction done, 0..1.
        **settings: Keys of the recipe's section `finetune`; `mode` is "peft" if left out.

    Raises:
        RecipeError: A key is unknown, the mode is "none", or nothing of the plan can be trained.
        TreeqError: The loss is not finite.
    """
    model = quantized.model.changed("finetune", {"mode": "peft"} | settings)
    if model.recipe.finetune.mode == "none":
        raise RecipeError("finetune.mode: received none, expected peft or qat.")
    quantized.check_calibrated()
    tensors, plan = quantized.tensors, quantized.plan
    trained, record = train(model.denoiser, plan, tensors, model.recipe, on_step)
    tensors = tensors | trained
    plan = plan.model_copy(update={"tensors_sha256": tensors_digest(tensors)})
    return replace(quantized, model=model, plan=plan, tensors=tensors, trained=record)


def compile(  # noqa: A001  the stage's name
    quantized: Quantized,
    target: TargetName = "ort",
    path: str | Path | None = None,
    **settings: Any,
) -> Graph:
    """Write and audit the graph of a target.

    Args:
        quantized: A calibrated network.
        target: The kind of graph; `docs/runtimes.md` says which one suits which runtime.
        path: The model file; weights that are large go to `<path>.data`. None keeps the graph in
            memory.
        **settings: Keys of the recipe's section `compile` but `targets`, such as `max_batch`.

    Raises:
        CompileError: The network cannot be exported, or a layer did not become integer arithmetic.
        RecipeError: A key is unknown, or a value is out of range.
        OutputError: The file cannot be written.
    """
    model = quantized.model.changed("compile", settings | {"targets": [target]})
    section, plan, tensors = model.recipe.compile, quantized.plan, quantized.tensors
    exported = export_graph(quantized.denoiser, section.max_batch)
    graph = lower_graph(exported, target, plan, section)
    if path is None:
        with scratch_folder() as folder:
            audit = write_graph(folder / "model.onnx", graph, target, plan, tensors, section)
        return Graph(target, graph, audit)
    path = Path(path)
    with atomic_path(path) as temporary:
        audit = write_graph(temporary, graph, target, plan, tensors, section)
        for file in model_files(temporary)[1:]:
            put_in_place(file, path.with_name(file.name))
    return Graph(target, graph, audit, path)


def validate(
    quantized: Quantized, *graphs: Graph, on_step: OnStep = no_progress, **settings: Any
) -> ParityRecord:
    """Compare every layer of compiled graphs with the fake-quantized network.

    Args:
        quantized: The network that was compiled.
        *graphs: The graphs, each of another target.
        on_step: Called with the fraction done, 0..1.
        **settings: Keys of the recipe's section `validate`, such as `batch_size`.

    Returns:
        The parity of every layer and target. Gates that are not met are in it.

    Raises:
        PlanError: A graph is of another plan.
        RecipeError: A key is unknown, or a value is out of range.
    """
    model = quantized.model.changed("validate", settings)
    quantized.check_calibrated()
    with scratch_folder() as run:
        for graph in graphs:
            file = run / RunFolder.graph(graph.target)
            file.parent.mkdir(parents=True)
            if graph.path is None:
                save_model(graph.model, file, "always")
                continue
            for part in model_files(graph.path):
                link_or_copy(part, file if part == graph.path else file.with_name(part.name))
        return run_validate(
            run,
            model.denoiser,
            quantized.plan,
            quantized.tensors,
            [graph.target for graph in graphs],
            model.recipe.validate_,
            model.recipe.seed,
            on_step,
        )
