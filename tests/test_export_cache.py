"""The exports that tests share: what tells one from another, and that they are the exporter's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from tests import export_cache
from tests.export_cache import export_key, export_once
from treeq_export.model.zoo import Denoiser

Make = Callable[..., Denoiser]


def set_weight(denoiser: Denoiser) -> None:
    with torch.no_grad():
        next(denoiser.parameters()).view(-1)[0] += 1


def set_attribute(denoiser: Denoiser) -> None:
    next(module for module in denoiser.modules() if isinstance(module, nn.LayerNorm)).eps = 0.5


def set_tensor_that_is_no_buffer(denoiser: Denoiser) -> None:
    denoiser.constant = torch.ones(2)


def drop_a_module(denoiser: Denoiser) -> None:
    name = next(n for n, m in denoiser.named_modules() if isinstance(m, nn.Dropout))
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, nn.Identity())


def test_equal_models_have_one_key(make_tiny_denoiser: Make):
    keys = {export_key(make_tiny_denoiser("dit"), 8) for _ in range(2)}
    assert len(keys) == 1
    assert export_key(make_tiny_denoiser("dit"), 9) not in keys


@pytest.mark.parametrize(
    "change", [set_weight, set_attribute, set_tensor_that_is_no_buffer, drop_a_module]
)
def test_any_change_is_another_key(change: Callable[[Denoiser], None], make_tiny_denoiser: Make):
    denoiser = make_tiny_denoiser("dit")
    before = export_key(denoiser, 8)
    change(denoiser)
    assert export_key(denoiser, 8) != before


def test_formats_are_in_the_key(compiled_dit: Any):
    quantized = compiled_dit.quantized()
    before = export_key(quantized, 8)
    layer = next(m for m in quantized.modules() if type(m).__name__ == "QLinear")
    layer.layer = layer.layer.model_copy(update={"rotation_group": 16})
    assert export_key(quantized, 8) != before


@pytest.mark.parametrize(
    "source",
    [
        *(f"treeq_export/{path}" for path in ("model/qlinear.py", "quant/numerics.py", "plan.py")),
        *("treeq_export/ops.py", "treeq_export/compile/export.py", "treeq_served/denoise.py"),
    ],
)
def test_the_exporter_s_sources_are_in_the_key(source: str):
    root = export_cache.ROOT
    assert root / source in {path for glob in export_cache.SOURCES for path in root.glob(glob)}


def test_classes_of_others_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Foreign(Denoiser):
        pass

    monkeypatch.setattr(export_cache, "FOLDER", tmp_path)
    monkeypatch.setattr(export_cache, "export_graph", lambda *_: "exported")
    assert export_once(Foreign(nn.Linear(1, 1), (1,), {}), 8) == "exported"
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_written_once_and_read_as_it_was(
    make_tiny_denoiser: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    weight = np.arange(6, dtype=np.float32)
    calls: list[int] = []

    def export(_: Denoiser, max_batch: int) -> ir.Model:
        calls.append(max_batch)
        value = ir.val("w", const_value=ir.tensor(weight, name="w"))
        graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
        return ir.Model(graph, ir_version=10)

    monkeypatch.setattr(export_cache, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(export_cache, "export_graph", export)
    denoiser = make_tiny_denoiser("dit")
    models = [export_once(denoiser, 8) for _ in range(2)]
    assert calls == [8]
    assert models[0] is not models[1]
    for model in models:
        np.testing.assert_array_equal(model.graph.initializers["w"].const_value, weight)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".onnx"]
