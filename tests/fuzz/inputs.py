"""Every file that a command reads: a right one, and the code that reads it.

A reader ends, or raises a TreeqError of one line; what runs inside a Triton server, a ValueError.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from tests.serve.lint_repositories import write_repository
from treeq_export.artefacts import sha256_of_file
from treeq_export.engines.cache import read_entry
from treeq_export.engines.graph_facts import read_facts
from treeq_export.engines.layer_list import parse_layers
from treeq_export.errors import PlanError
from treeq_export.evaluate.samples import sample_or_load
from treeq_export.evaluate.scores import _load_reference
from treeq_export.model.checkpoint import open_checkpoint
from treeq_export.model.conditioning import load_prompts
from treeq_export.model.torch_file import read_torch_file
from treeq_export.pipeline.workspace import read_run
from treeq_export.plan import load_plan, load_tensors
from treeq_export.recipe import load_recipe
from treeq_export.records import (
    BenchRecord,
    CompareRecord,
    CompileRecord,
    FinetuneRecord,
    ParityRecord,
    QualityRecord,
    SearchRecord,
    load_record,
)
from treeq_export.records.build import BuildRecord
from treeq_export.run_folder import RunFolder
from treeq_export.runners.cubin_launcher import read_manifest as read_kernels
from treeq_export.runners.engine_manifest import read_manifest
from treeq_export.runners.graph_file import read_graph
from treeq_export.runners.graph_meta import LayerSite, read_layers, read_profile, write_layers
from treeq_export.search.journal import Journal
from treeq_export.search.store import Store
from treeq_export.serve.lint import lint_repository
from treeq_export.serve.tensors import read_graph as read_served
from treeq_export.serve.vae import open_vae
from treeq_served import check_manifest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "samples" / "results"
GOLDEN = ROOT / "tests" / "golden"


class Input(NamedTuple):
    """A file that is read.

    Attributes:
        name: Its name.
        long: How many damaged ones the long tier reads.
        make: Writes the right file, and what it needs, below a folder; returns its path.
        read: Reads it.
        exact: Whether a digest says of any change that it is one.
    """

    name: str
    long: int
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    exact: bool = False


def _copy(source: Path, *beside: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for file in (source, *beside):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder / source.name

    return make


def _record(kind: Any) -> Callable[[Path], object]:
    return lambda path: load_record(path, kind, "compile")


def _text(name: str, content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make


# Recipe and run -----------------------------------------------------------------------------------


def _read_setting(path: Path) -> object:
    data = path.read_bytes().decode("utf-8", "surrogateescape")
    return load_recipe(ROOT / "samples" / "digits" / "recipe.yaml", [data])


def _make_run(folder: Path) -> Path:
    recipe = load_recipe(ROOT / "samples" / "digits" / "recipe.yaml")
    stage = {"fingerprint": "f", "seconds": 1.0, "outputs": {"plan.json": "0"}}
    record = {
        "recipe_path": "recipe.yaml",
        "overrides": [],
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "stages": {"search": stage},
    }
    return _text("run.json", record)(folder)


# Plan ---------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> object:
    """Read tensors whose digest fits, as those of another program would."""
    plan = load_plan(path.parent)
    return load_tensors(
        path.parent, plan.model_copy(update={"tensors_sha256": sha256_of_file(path)})
    )


def _make_finetuned(folder: Path, name: str) -> Path:
    _copy(GOLDEN / "plan.json", GOLDEN / "plan.safetensors")(folder)
    (folder / RunFolder.FINETUNED).write_bytes((GOLDEN / "plan.safetensors").read_bytes())
    digests = {
        "base_tensors_sha256": load_plan(folder).tensors_sha256,
        "tensors_sha256": sha256_of_file(folder / RunFolder.FINETUNED),
    }
    _text(RunFolder.FINETUNE, digests)(folder)
    return folder / name


def _read_all_tensors(path: Path) -> object:
    return load_tensors(path.parent, load_plan(path.parent))


# Graphs -------------------------------------------------------------------------------------------


def make_graph(folder: Path, *, external: bool = False) -> Path:
    """Write a graph with metadata, an attribute with a tensor, and perhaps external data."""
    weight = np.arange(512, dtype=np.float32).reshape(16, 32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["p"], name="fc"),
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight[:1], "t")),
            helper.make_node("Add", ["p", "c"], ["y"], name="add"),
        ],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = ir.from_proto(proto)
    write_layers(model, [LayerSite("fc", "x", "p", "fc")])
    shapes = {"min": [1, 16], "opt": [2, 16], "max": [8, 16]}
    model.metadata_props["treeq.batch_profile"] = json.dumps({"x": shapes})
    path = folder / "model.onnx"
    ir.save(
        model, path, external_data="model.onnx.data" if external else None, size_threshold_bytes=0
    )
    return path


def read_whole_graph(path: Path) -> None:
    """Read a graph as compile, validate, bisect, build and serve do, and every weight."""
    model = read_graph(path, error=PlanError, remedy="Compile again.")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()
    read_layers(model)
    read_profile(model)
    read_facts(path, 8)
    read_served(path)


# Checkpoints --------------------------------------------------------------------------------------


def _make_checkpoint(folder: Path, name: str) -> Path:
    source = ROOT / "samples" / "digits" / "checkpoint"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = "diffusion_pytorch_model.safetensors"
    if name == "diffusion_pytorch_model.safetensors.index.json":
        save_file({"a": np.zeros(2, np.float32)}, folder / "shard-1.safetensors")
        _text(name, {"metadata": {}, "weight_map": {"a": "shard-1.safetensors"}})(folder)
    else:
        save_file(
            {"a": np.zeros((3, 4), np.float32), "b": np.ones(2, np.float16)}, folder / weights
        )
    return folder / name


def _make_torch_file(folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save({"x_embedder.proj.weight": torch.zeros(2, 3)}, path)
    return path


def _make_tensors(folder: Path, **shapes: tuple[int, ...]) -> Path:
    path = folder / "tensors.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)
    return path


TEXT = {"encoder_hidden_states": (6, 4), "pooled_projections": (5,)}


def _make_prompts(folder: Path) -> Path:
    return _make_tensors(folder, encoder_hidden_states=(3, 6, 4), pooled_projections=(3, 5))


def _make_vae(folder: Path) -> Path:
    (folder / "diffusion_pytorch_model.safetensors").touch()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8]}
    return _text("config.json", config | {"out_channels": 3, "norm_num_groups": 8})(folder)


# Serving ------------------------------------------------------------------------------------------


def _make_repository(folder: Path, name: str) -> Path:
    return write_repository(folder / "repository") / name


def _lint(path: Path) -> object:
    root = next(parent for parent in path.parents if parent.name == "repository")
    return lint_repository(root, Path("/srv/final"))


def _make_served(folder: Path) -> Path:
    (folder / "denoiser" / "1").mkdir(parents=True)
    (folder / "denoiser" / "1" / "model.py").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    manifest = {
        "format_version": 1,
        "treeq_version": "1",
        "name": "tiny",
        "plan_sha256": {"1": "p"},
        "target": "ort",
        "mode": "bls",
        "backend": "python",
        "backend_version": "1",
        "root": None,
        "gpu": None,
        "denoiser": {"profile": {"min": 1, "opt": 2, "max": 8}},
        "models": {"denoiser": [1]},
        "packages": {"denoiser": {"numpy": np.__version__}},
        "files": {"denoiser/1/model.py": {"bytes": 1, "sha256": digest}},
    }
    return _text("manifest.json", manifest)(folder)


def _check_served(path: Path) -> object:
    return check_manifest.check_repository(path.parent, Path("/none"))


# Others -------------------------------------------------------------------------------------------


def _make_journal(folder: Path) -> Path:
    path = folder / "journal.sqlite"
    with Journal(path, "f") as journal:
        for number in range(50):
            journal.record("node", "w4", f"a{number}", float(number), 0.1)
    return path


def _read_journal(path: Path) -> object:
    with Journal(path, "f", busy_timeout_s=0.1) as journal:
        return journal.lookup("node", "w4")


SAMPLES = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def _make_samples(folder: Path) -> Path:
    path = folder / "fp_seed0.safetensors"
    sample_or_load(path, "f", lambda: SAMPLES)
    return path


def _read_samples(path: Path) -> None:
    """Samples are those that were made, or made again; never what damage left of them."""
    assert np.array_equal(sample_or_load(path, "f", lambda: SAMPLES), SAMPLES.numpy())


def _make_rows(folder: Path) -> Path:
    Store(folder, "f").save("rows.safetensors", {"sample": SAMPLES, "prediction": -SAMPLES})
    return folder / "rows.safetensors"


def _read_rows(path: Path) -> None:
    """Rows of a search are those that were saved, or there are none."""
    store = Store(path.parent, "f")
    if store.has(path.name):
        rows, prediction = store.load_rows(path.name)
        assert torch.equal(rows["sample"], SAMPLES)
        assert torch.equal(prediction, -SAMPLES)


def _make_engine(folder: Path) -> Path:
    built = json.loads((RESULTS / "tensorrt" / "digits_build.json").read_text())
    return _text("manifest.json", built["engines"][0]["manifest"])(folder)


_KERNEL = {
    "name": "qlinear",
    "arch": "sm_80",
    "file": "a.cubin",
    "sha256": "0",
    "function": "f",
    "shared_bytes": 1,
    "num_warps": 4,
    "params": [["x", "*fp16"]],
}
_LAYERS = {"Layers": [{"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}]}]}


def _read_layer_list(path: Path) -> object:
    return parse_layers(path.read_bytes().decode("utf-8", "replace"))


DIGITS = RESULTS / "digits"
CHECKPOINT = "diffusion_pytorch_model.safetensors"
INPUTS = (
    Input("recipe", 700, _copy(ROOT / "samples/digits/recipe.yaml"), load_recipe),
    Input("set", 700, _text("set", "search.weight_candidates=[2, 3, 4]"), _read_setting),
    Input("run.json", 600, _make_run, lambda path: read_run(path.parent)),
    Input("plan.json", 600, _copy(GOLDEN / "plan.json"), lambda path: load_plan(path.parent)),
    Input(
        "plan.safetensors, digest fits",
        600,
        _copy(GOLDEN / "plan.safetensors", GOLDEN / "plan.json"),
        _read_tensors,
    ),
    Input(
        "plan.safetensors",
        300,
        _copy(GOLDEN / "plan.safetensors", GOLDEN / "plan.json"),
        _read_all_tensors,
        exact=True,
    ),
    Input(
        "finetune.json", 400, lambda f: _make_finetuned(f, RunFolder.FINETUNE), _read_all_tensors
    ),
    Input(
        "finetuned.safetensors",
        300,
        lambda f: _make_finetuned(f, RunFolder.FINETUNED),
        _read_all_tensors,
        exact=True,
    ),
    Input("search.json", 150, _copy(DIGITS / "search.json"), _record(SearchRecord)),
    Input("compile.json", 300, _copy(DIGITS / "compile.json"), _record(CompileRecord)),
    Input("parity.json", 200, _copy(DIGITS / "parity.json"), _record(ParityRecord)),
    Input("bench.json", 300, _copy(DIGITS / "bench.json"), _record(BenchRecord)),
    Input("quality.json", 300, _copy(DIGITS / "quality.json"), _record(QualityRecord)),
    Input("finetune record", 200, _copy(DIGITS / "finetune.json"), _record(FinetuneRecord)),
    Input(
        "compare.json", 200, _copy(RESULTS / "digits_compare/compare.json"), _record(CompareRecord)
    ),
    Input("build.json", 200, _copy(RESULTS / "tensorrt/digits_build.json"), _record(BuildRecord)),
    Input("graph", 1000, make_graph, read_whole_graph),
    Input(
        "graph with external data", 500, lambda f: make_graph(f, external=True), read_whole_graph
    ),
    Input(
        "external data",
        300,
        lambda f: make_graph(f, external=True).with_name("model.onnx.data"),
        lambda path: read_whole_graph(path.with_name("model.onnx")),
    ),
    Input("engine manifest", 300, _make_engine, lambda path: read_manifest(path.parent)),
    Input("cache entry", 200, _text("entry.json", {}), lambda path: read_entry(path.parent)),
    Input("layer list", 300, _text("layers", _LAYERS), _read_layer_list),
    Input(
        "kernels.json",
        300,
        _text("kernels.json", {"kernels": [_KERNEL]}),
        lambda path: read_kernels(path.parent),
    ),
    Input("served manifest", 500, _make_served, _check_served),
    Input("linted manifest", 200, lambda f: _make_repository(f, "manifest.json"), _lint),
    Input("config.pbtxt", 300, lambda f: _make_repository(f, "denoiser/config.pbtxt"), _lint),
    Input("linted graph", 200, lambda f: _make_repository(f, "denoiser/1/model.onnx"), _lint),
    Input(
        "config.json",
        500,
        lambda f: _make_checkpoint(f, "config.json"),
        lambda path: open_checkpoint(path.parent),
    ),
    Input(
        "checkpoint index",
        400,
        lambda f: _make_checkpoint(f, f"{CHECKPOINT}.index.json"),
        lambda path: open_checkpoint(path.parent),
    ),
    Input(
        "checkpoint",
        400,
        lambda f: _make_checkpoint(f, CHECKPOINT),
        lambda path: open_checkpoint(path.parent),
    ),
    Input("checkpoint .pt", 300, _make_torch_file, read_torch_file),
    Input("conditioning", 300, _make_prompts, lambda path: load_prompts(path, TEXT)),
    Input(
        "reference",
        300,
        lambda f: _make_tensors(f, mean=(4,), covariance=(4, 4)),
        lambda path: _load_reference(path, 4),
    ),
    Input("vae", 300, _make_vae, lambda path: open_vae(path.parent, (4, 8, 8))),
    Input("samples", 300, _make_samples, _read_samples),
    Input("rows of a search", 300, _make_rows, _read_rows),
    Input("journal", 300, _make_journal, _read_journal),
)
