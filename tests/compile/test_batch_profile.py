import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from treeq_export.compile.batch_profile import write_batch_profile
from treeq_export.errors import CompileError, PlanError
from treeq_export.recipe import CompileSection
from treeq_export.runners.graph_meta import PROFILE_KEY, read_profile

Make = Callable[..., Any]


def test_profile_of_every_input(exported_dit: Any):
    model = exported_dit.clone()
    write_batch_profile(model, 2, 8)
    profile = read_profile(model)
    assert profile is not None
    profile = {name: shapes.model_dump() for name, shapes in profile.items()}
    assert profile == json.loads(model.metadata_props[PROFILE_KEY])
    assert profile == {
        "sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 8, 8]},
        "timestep": {"min": [1], "opt": [2], "max": [8]},
        "class_labels": {"min": [1], "opt": [2], "max": [8]},
    }


def test_errors(make_layer: Make, make_model: Make):
    model = make_model(make_layer())
    assert read_profile(model) is None
    for text in ("[", "[]", '{"x": 1}', '{"x": {"min": [1], "opt": [2]}}', "[" * 100_000):
        model.metadata_props[PROFILE_KEY] = text
        with pytest.raises(PlanError, match=r"^the graph: treeq\.batch_profile: .*compile` again"):
            read_profile(model)
    model.graph.inputs[0].shape = None
    with pytest.raises(CompileError, match=r"^x: .*does not say its shape"):
        write_batch_profile(model, 1, 2)


def test_opt_batch_is_within_max_batch():
    assert CompileSection().opt_batch == 2
    assert CompileSection(opt_batch=4, max_batch=4).opt_batch == 4
    with pytest.raises(ValidationError, match="opt_batch 5 is above max_batch 4"):
        CompileSection(opt_batch=5, max_batch=4)
