"""Measured errors against the whole network with its linears replaced, computed another way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from treeq_export.model.fit import quantize_layer
from treeq_export.model.layers import discover_linears
from treeq_export.model.replay import BlockReplay, Output
from treeq_export.model.sequential import arrays_of
from treeq_export.model.statistics import collect_statistics
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import Recipe
from treeq_export.search.executor import Task
from treeq_export.search.formats import make_layer_plan, make_templates
from treeq_export.search.measure.bank import LayerBank
from treeq_export.search.measure.whole import WholeNetwork
from treeq_export.search.measure.worker import MeasuringWorker
from treeq_export.search.network import make_network
from treeq_export.search.prepare import prepare
from treeq_export.search.session import Session
from treeq_export.search.store import Store
from treeq_export.search.tree import Configuration, Leaf, decode, encode, walk

FAMILIES = ("dit", "pixart", "sd3", "flux")
ENVIRONMENT = (2, 3)


@dataclass
class Search:
    """A prepared search of a tiny model, and the same model with replaced linears."""

    session: Session
    denoiser: Denoiser
    bank: LayerBank

    @property
    def recipe(self) -> Recipe:
        return self.session.recipe

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.session.network.leaves

    @property
    def store(self) -> Store:
        return self.session.store

    def open(self, noise: float) -> MeasuringWorker:
        search = self.recipe.search.model_copy(update={"noise": noise})
        recipe = self.recipe.model_copy(update={"search": search})
        return MeasuringWorker(replace(self.session, recipe=recipe), self.denoiser)

    def outputs(self, configuration: Configuration) -> tuple[list[Output], torch.Tensor]:
        """Every block's output and the prediction, by hooks on the model with QLinear in place."""
        replaced: list[tuple[nn.Module, str, Any]] = []
        for leaf, pair in zip(self.leaves, configuration, strict=True):
            for linear in leaf.linears if pair else ():
                assert pair is not None
                parent_name, _, child = linear.name.rpartition(".")
                parent = self.denoiser.model.get_submodule(parent_name)
                replaced.append((parent, child, parent._modules[child]))
                parent._modules[child] = self.bank.layer(linear.name, *pair)
        found: list[Output] = []
        handles = [
            self.denoiser.model.get_submodule(name).register_forward_hook(
                lambda *call: found.append(call[2] if isinstance(call[2], tuple) else (call[2],))
            )
            for name in self.session.network.blocks
        ]
        rows, _ = self.store.load_rows()
        try:
            with torch.no_grad():
                raw = self.denoiser(*(rows[name] for name in self.denoiser.input_names))
        finally:
            for parent, child, module in replaced:
                parent._modules[child] = module
            for handle in handles:
                handle.remove()
        return found, self.denoiser.prediction(raw)


def mean_square(one: Output, other: Output) -> float:
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    total = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    return total / sum(x.numel() for x, _ in pairs)


@pytest.fixture(scope="module")
def prepared(
    make_tiny_denoiser: Callable[..., Denoiser],
    make_tiny_recipe: Callable[..., Recipe],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Search]:
    """A function: family -> a prepared search, made once."""
    made: dict[str, Search] = {}

    def make(family: str) -> Search:
        if family not in made:
            made[family] = prepare_family(
                make_tiny_recipe(
                    family,
                    strategy="tss",
                    weight_candidates=[2, 3],
                    activation_candidates=[3, 8],
                    num_rows=5,
                    num_samples=3,
                    num_probes=0,
                ),
                make_tiny_denoiser(family),
                tmp_path_factory.mktemp("search"),
            )
        return made[family]

    return make


def prepare_family(recipe: Recipe, denoiser: Denoiser, folder: Path) -> Search:
    network = make_network(discover_linears(denoiser))
    fixed = recipe.search.branch
    branches = {x.name: fixed for x in network.linears if fixed}
    session = Session(
        folder=folder,
        recipe=recipe,
        checkpoint_sha256="",
        network=replace(network, branches=branches),
        environment=(ENVIRONMENT,) * len(network.leaves),
        batch_rows=3,  # of 5 rows: two batches, one of them short
    )
    templates = make_templates(network, recipe.search)
    prepare(
        session,
        denoiser,
        lambda: collect_statistics(denoiser, templates, recipe, lambda _: None),
        lambda _: None,
    )
    return Search(session, denoiser, LayerBank(session, denoiser))


def close_to(value: float) -> Any:
    return pytest.approx(value, rel=2e-3)  # float32 in other batches: codes on a border may flip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_every_merge_measures_what_the_whole_network_gives(
    family: str, noise: float, prepared: Callable[[str], Search]
):
    search = prepared(family)
    _, prediction = search.outputs((None,) * len(search.leaves))
    worker = search.open(noise)
    root = search.session.network.root
    values = {}
    try:
        for node, _ in walk(root):
            if node.children:
                left, right = (child.num_leaves for child in node.children)
                prefix = encode(((2, 3), (3, 8), (2, 8), (3, 3))[:left] + ((2, 3),) * (left - 4))
                suffixes = tuple(encode((pair,) * right) for pair in ((2, 8), (3, 3)))
                task = Task(node.name, prefix, suffixes)
                values[node] = (task, list(worker.measure(task)))
    finally:
        worker.close()
    assert len(values) == len(search.leaves) - 1
    for node, (task, measured) in values.items():
        for suffix, value in zip(task.suffixes, measured, strict=True):
            inside = decode(task.prefix) + decode(suffix)
            before = (ENVIRONMENT if noise else None,) * node.first
            after = (None,) * (len(search.leaves) - node.last - 1)
            outputs, predicted = search.outputs((*before, *inside, *after))
            if node is root:
                expected = mean_square((predicted,), (prediction,))
            else:
                same_input = (None,) * node.num_leaves
                wanted, _ = search.outputs((*before, *same_input, *after))
                expected = mean_square(outputs[node.last_block], wanted[node.last_block])
            assert value == close_to(expected), node.name
            assert value > 0


def test_noise_between_mixes_the_inputs(prepared: Callable[[str], Search]):
    search = prepared("dit")
    clean, _ = search.outputs((None,) * 10)
    dirty, _ = search.outputs((ENVIRONMENT,) * 10)
    rows, _ = search.store.load_rows()
    node = search.session.network.root.children[1]
    assert (node.name, node.first_block) == ("segment 5..9", 1)
    pairs: Configuration = ((3, 8),) * 4
    worker = search.open(0.25)
    try:
        (value,) = worker.measure(Task(node.name, encode(pairs), ("2/3",)))
    finally:
        worker.close()
    before = tuple(
        x + 0.25 * (x_q - x)
        for x, x_q in zip(clean[0], dirty[0], strict=True)
        if x is not None and x_q is not None
    )
    wanted = run_second_block(search, rows, before, (None,) * 5)
    received = run_second_block(search, rows, before, (*pairs, (2, 3)))
    assert value == close_to(mean_square(received, wanted))


def run_second_block(search: Search, rows: Rows, before: Output, pairs: Configuration) -> Output:
    originals = {}
    for leaf, pair in zip(search.leaves[5:], pairs, strict=True):
        for linear in leaf.linears if pair else ():
            assert pair is not None
            module = search.denoiser.model.get_submodule(linear.name)
            originals[linear.name] = module.forward
            module.forward = search.bank.layer(linear.name, *pair).forward
    try:
        with BlockReplay(search.denoiser, search.session.network.blocks) as replay:
            return replay.run(rows, first=1, last=1, recorded=lambda _: before)
    finally:
        for name in originals:
            del search.denoiser.model.get_submodule(name).forward


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_configurations_do_not_depend_on_the_base(
    family: str, prepared: Callable[[str], Search]
):
    search = prepared(family)
    number = len(search.leaves)
    _, prediction = search.outputs((None,) * number)
    base: Configuration = ((2, 8),) * number
    late = (*base[:-1], (3, 3))
    early = ((3, 3), *base[1:])
    alone = (*(None,) * (number - 1), (2, 3))
    texts = tuple(encode(c) for c in (base, late, early, alone))
    worker = search.open(1.0)
    try:
        from_base = list(worker.measure(Task(WholeNetwork.NAME, encode(base), texts)))
        from_clean = list(worker.measure(Task(WholeNetwork.NAME, "", texts)))
        from_late = list(worker.measure(Task(WholeNetwork.NAME, encode(late), texts)))
    finally:
        worker.close()
    # Recorded outputs may lie otherwise in memory, which changes the order of a summation.
    assert from_clean == pytest.approx(from_base, rel=1e-6)
    assert from_late == pytest.approx(from_base, rel=1e-6)
    for configuration, value in zip((base, late, early, alone), from_base, strict=True):
        _, predicted = search.outputs(configuration)
        assert value == close_to(mean_square((predicted,), (prediction,)))


def test_with_probes_a_segment_is_measured_by_what_it_does_to_the_prediction(
    prepared: Callable[[str], Search], tmp_path: Path
):
    plain = prepared("dit")
    section = plain.recipe.search.model_copy(update={"num_probes": 200})
    recipe = plain.recipe.model_copy(update={"search": section})
    search = prepare_family(recipe, plain.denoiser, tmp_path)
    _, prediction = search.outputs((None,) * 10)
    worker = search.open(0.0)
    try:
        (alone,) = worker.measure(Task("segment 1..1", "", ("3/8",)))
        (merged,) = worker.measure(Task("segment 5..6", "2/8", ("3/8",)))
    finally:
        worker.close()
    for value, before, inside in ((alone, 1, ((3, 8),)), (merged, 5, ((2, 8), (3, 8)))):
        after = (None,) * (10 - before - len(inside))
        _, predicted = search.outputs((None,) * before + inside + after)
        # To first order, and with 200 directions of 5 rows.
        assert value == pytest.approx(mean_square((predicted,), (prediction,)), rel=0.2)


def test_what_is_left_of_a_merge_runs_once_per_left_configuration(
    prepared: Callable[[str], Search], monkeypatch: pytest.MonkeyPatch
):
    search = prepared("dit")
    calls: list[str] = []
    layer = LayerBank.layer

    def count(self: LayerBank, name: str, weight_bits: int, activation_bits: int) -> Any:
        calls.append(name)
        return layer(self, name, weight_bits, activation_bits)

    monkeypatch.setattr(LayerBank, "layer", count)
    worker = search.open(0.0)
    suffixes = ("2/3", "2/8", "3/3", "3/8")
    try:
        list(worker.measure(Task("segment 2..3", "2/8", suffixes)))
        inside = {name.split(".", 2)[2]: calls.count(name) for name in calls}
        calls.clear()
        across = tuple(" ".join([pair] * 5) for pair in suffixes)
        list(worker.measure(Task("segment 0..9", " ".join(["2/8"] * 5), across)))
        blocks = {block: sum(f"blocks.{block}." in name for name in calls) for block in (0, 1)}
    finally:
        worker.close()
    # Two batches: each runs the left leaf once and the right leaf once per suffix.
    assert inside == {"attn1.to_out.0": 2, "ff.net.0.proj": 8}
    assert blocks == {0: 2 * 7, 1: 2 * 7 * 4}


def test_a_session_can_be_sent_to_another_process(prepared: Callable[[str], Search]):
    session = prepared("dit").session
    assert ForkingPickler.loads(ForkingPickler.dumps(session)) == session


def test_closing_gives_the_model_back(prepared: Callable[[str], Search]):
    search = prepared("dit")
    worker = search.open(1.0)
    assert any("forward" in vars(module) for module in search.denoiser.modules())
    worker.close()
    assert not any("forward" in vars(module) for module in search.denoiser.modules())


def test_layers_beyond_the_limit_are_loaded_again(prepared: Callable[[str], Search]):
    search = prepared("dit")
    linears = search.session.network.linears
    small = LayerBank(search.session, search.denoiser, limit_bytes=1)
    x = torch.randn(2, 64)
    for name in (linears[0].name, linears[1].name, linears[0].name):
        for pair in ((2, 3), (3, 8), (2, 8)):
            expected = search.bank.layer(name, *pair)(x)
            assert torch.equal(small.layer(name, *pair)(x), expected)
            assert len(small._layers) == 1


def test_every_pair_has_the_weight_that_calibration_gives_it(
    prepared: Callable[[str], Search], tmp_path: Path
):
    plain = prepared("dit")
    fitted = {"inputs": "quantized", "bias_correction": True, "rounding": "gptq"}
    calibrate = plain.recipe.calibrate.model_copy(update=fitted)
    recipe = plain.recipe.model_copy(update={"calibrate": calibrate})
    search = prepare_family(recipe, plain.denoiser, tmp_path)
    linear = search.leaves[1].linears[0]
    branch = search.session.network.branches.get(linear.name)
    templates = make_templates(search.session.network, recipe.search)
    statistics = collect_statistics(search.denoiser, templates, recipe, lambda _: None)
    tokens = statistics[linear.name].thin(8 * linear.in_features, recipe.seed)
    module = search.denoiser.model.get_submodule(linear.name)
    assert isinstance(module, nn.Linear)
    weight, bias = arrays_of(module)
    codes: list[Any] = []
    for pair in ((3, 3), (3, 8)):
        planned = make_layer_plan(linear, recipe.search, *pair, branch)
        expected = quantize_layer(planned, weight, tokens, recipe.calibrate, bias)
        layer = search.bank.layer(linear.name, *pair)
        codes.append(layer.codes)
        assert np.array_equal(codes[-1], expected["codes"])
        assert layer.bias is not None
        assert np.array_equal(layer.bias.numpy(), expected["bias"])
        assert layer.layer.activation.bits == pair[1]
    assert not np.array_equal(*codes)


def test_prepared_files_are_kept(prepared: Callable[[str], Search], tmp_path: Path):
    search = prepared("dit")
    before = {path: path.stat().st_mtime_ns for path in search.store.folder.rglob("*.safetensors")}

    def fail() -> Any:
        raise AssertionError("nothing is missing")

    prepare(search.session, search.denoiser, fail, lambda _: None)
    after = {path: path.stat().st_mtime_ns for path in search.store.folder.rglob("*.safetensors")}
    assert before == after
    assert not Store(search.store.folder, "other").has("rows.safetensors")
    assert not Store(tmp_path, search.session.weights_fingerprint).has("rows.safetensors")
