"""The plan's files: their exact bytes, and one line for whatever is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import FormatError, PlanError
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    Tensors,
    TreePath,
    json_schema,
    load_plan,
    load_tensors,
    plan_to_json,
    save_plan,
)
from treeq_export.quant.spec import ActivationFormat, BranchFormat, WeightFormat
from treeq_export.run_folder import RunFolder

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = "0123456789abcdef" * 4

PLAN = Plan(
    format_version=FORMAT_VERSION,
    model=ModelRecord(name="tiny-Größe", class_name="DiTTransformer2DModel", num_parameters=123),
    checkpoint_sha256=CHECKPOINT,
    strategy=StrategyRecord(name="uniform", options={"weight_bits": 4, "exclude": ["*.emb.*"]}),
    layers=(
        LayerPlan(
            name="transformer_blocks.0.attn1.to_q",
            in_features=8,
            out_features=4,
            tree=TreePath(block=0, position="attn1.to_q", leaf=0),
            weight=WeightFormat(bits=4),
            activation=ActivationFormat(bits=4, scale="token_rms"),
            rotation_group=8,
        ),
        LayerPlan(
            name="transformer_blocks.0.ff.net.2",
            in_features=8,
            out_features=6,
            tree=TreePath(block=0, position="ff.net.2", leaf=1),
            weight=WeightFormat(bits=3, group_size=4),
            activation=ActivationFormat(bits=8, scale="token_absmax"),
            rotation_group=2,
            branch=BranchFormat(b_in=2, b_out=3, rank=2),
        ),
        LayerPlan(
            name="proj_out",
            in_features=6,
            out_features=2,
            tree=TreePath(block=1, position="proj_out", leaf=2),
            weight=WeightFormat(bits=8),
            activation=ActivationFormat(bits=None, scale="none"),
        ),
    ),
)


def tensors_of(plan: Plan) -> Tensors:
    """Numbers that count up, of the shapes in the plan's module docstring."""
    tensors: Tensors = {}
    for layer in plan.layers:
        n, k = layer.out_features, layer.in_features
        half = 1 << (layer.weight.bits - 1)
        groups = k // (layer.weight.group_size or k)
        codes = np.arange(n * k).reshape(n, k) % (2 * half) - half
        tensors[f"{layer.name}.weight_scale"] = counting(n, groups)
        tensors[f"{layer.name}.codes"] = codes.astype(np.int8)
        if layer.activation.bits is not None:
            tensors[f"{layer.name}.activation_step"] = counting(1)
        if layer.branch is not None:
            b_in, b_out, rank = layer.branch.b_in, layer.branch.b_out, layer.branch.rank
            tensors[f"{layer.name}.branch.R"] = counting(b_in, k // b_in, b_out * rank)
            tensors[f"{layer.name}.branch.L"] = counting(b_out, b_in * rank, n // b_out)
    return tensors


def counting(*shape: int) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape) / 64


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a calibrated plan."""
    save_plan(tmp_path, PLAN, tensors_of(PLAN))
    return tmp_path


def edit(run: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of the plan in place."""
    path = run / RunFolder.PLAN
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def message_of(run: Path, checkpoint_sha256: str | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        load_plan(run, checkpoint_sha256)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Bytes ------------------------------------------------------------------------------------------


def test_golden_bytes(run: Path):
    assert (run / RunFolder.PLAN).read_bytes() == (GOLDEN / RunFolder.PLAN).read_bytes()
    assert (run / RunFolder.TENSORS).read_bytes() == (GOLDEN / RunFolder.TENSORS).read_bytes()


def test_the_golden_plan_loads():
    plan = load_plan(GOLDEN, CHECKPOINT)
    assert plan.model_copy(update={"tensors_sha256": None}) == PLAN
    assert plan.tensors_sha256 == sha256_of_file(GOLDEN / RunFolder.TENSORS)
    found, expected = load_tensors(GOLDEN, plan), tensors_of(PLAN)
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name], expected[name])


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path):
    plan = load_plan(GOLDEN)
    saved = save_plan(tmp_path, plan, load_tensors(GOLDEN, plan))
    assert saved == plan
    for name in (RunFolder.PLAN, RunFolder.TENSORS):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_the_order_of_the_tensors_does_not_matter(tmp_path: Path):
    tensors = tensors_of(PLAN)
    backwards = dict(reversed(tensors.items()))
    assert list(backwards) != list(tensors)
    save_plan(tmp_path, PLAN, backwards)
    assert (tmp_path / RunFolder.TENSORS).read_bytes() == (GOLDEN / RunFolder.TENSORS).read_bytes()


def test_memory_order_does_not_matter(tmp_path: Path):
    save_plan(tmp_path, PLAN, {k: np.asfortranarray(v) for k, v in tensors_of(PLAN).items()})
    assert (tmp_path / RunFolder.TENSORS).read_bytes() == (GOLDEN / RunFolder.TENSORS).read_bytes()


def test_saved_plan_and_its_text(tmp_path: Path):
    saved = save_plan(tmp_path / "new" / "run", PLAN)
    assert saved == PLAN
    text = (tmp_path / "new" / "run" / RunFolder.PLAN).read_text(encoding="utf-8")
    assert text == plan_to_json(PLAN)
    assert text.endswith('  "tensors_sha256": null\n}\n')
    assert "tiny-Größe" in text
    assert not (tmp_path / "new" / "run" / RunFolder.TENSORS).exists()


def test_searching_again_forgets_the_old_calibration(run: Path):
    save_plan(run, load_plan(run))
    assert load_plan(run).tensors_sha256 is None
    with pytest.raises(PlanError, match=r"Run `treeq-export calibrate --run .+` first"):
        load_tensors(run, load_plan(run))


# Numbers ----------------------------------------------------------------------------------------


def test_averages_are_weighted_by_the_number_of_weights():
    assert [layer.num_weights for layer in PLAN.layers] == [32, 48, 12]
    assert PLAN.average_weight_bits == pytest.approx((4 * 32 + 3 * 48 + 8 * 12) / 92)
    assert PLAN.average_activation_bits == pytest.approx((4 * 32 + 8 * 48 + 32 * 12) / 92)
    assert PLAN.branch_parameter_fraction == pytest.approx(2 * (6 * 2 + 8 * 3) / 92)


def test_averages_of_an_empty_plan_are_zero():
    empty = PLAN.model_copy(update={"layers": ()})
    assert empty.average_weight_bits == 0
    assert empty.average_activation_bits == 0
    assert empty.branch_parameter_fraction == 0


def test_layer_by_name():
    assert PLAN.layer("proj_out") is PLAN.layers[2]
    with pytest.raises(PlanError) as caught:
        PLAN.layer("proj_in")
    assert str(caught.value) == "proj_in: not in the plan of 3 layers."


# Errors of plan.json ----------------------------------------------------------------------------


def test_no_plan(tmp_path: Path):
    assert message_of(tmp_path) == (
        f"{tmp_path / RunFolder.PLAN}: no plan. Run `treeq-export search --run {tmp_path}` first."
    )


@pytest.mark.parametrize("data", [b"", b"{", b"\x00", b"\xff\xfe", b"{'a': 1}", b"{} {}"])
def test_not_json(data: bytes, run: Path):
    (run / RunFolder.PLAN).write_bytes(data)
    text = message_of(run)
    assert text.startswith(f"{run / RunFolder.PLAN}: not JSON (")
    assert text.endswith(f"Run `treeq-export search --run {run}` again.")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version(version: Any, run: Path):
    # A newer format may hold anything else, so its version is looked at first.
    edit(run, lambda raw: raw.update(format_version=version, novelty=1))
    assert message_of(run) == (
        f"{run / RunFolder.PLAN}: format_version {version}, expected 1. "
        "Install the treeq-export that wrote it, or search again with this one."
    )


@pytest.mark.parametrize("text", ["[]", "3", '"plan"', "null", "{}"])
def test_json_that_is_no_plan(text: str, run: Path):
    (run / RunFolder.PLAN).write_text(text)
    assert "format_version None, expected 1" in message_of(run)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda raw: raw.update(surplus=1), "surplus: Extra inputs are not permitted (received 1)"),
        (
            lambda raw: raw["layers"][1]["weight"].update(zero_point=3),
            "layers.1.weight.zero_point: Extra inputs are not permitted (received 3)",
        ),
        (
            lambda raw: raw["layers"][0]["weight"].update(bits=9),
            "layers.0.weight.bits: Input should be less than or equal to 8 (received 9)",
        ),
        (
            lambda raw: raw["layers"][0]["activation"].update(bits=1),
            "layers.0.activation.bits: Input should be greater than or equal to 2 (received 1)",
        ),
        (
            lambda raw: raw["layers"][0]["activation"].update(bits=None),
            "layers.0.activation: Value error, bits is null exactly where scale is 'none' (",
        ),
        (
            lambda raw: raw["layers"][0]["activation"].update(scale="token_max"),
            "layers.0.activation.scale: Input should be 'token_rms', 'token_absmax', ",
        ),
        (
            lambda raw: raw["layers"][0].update(in_features="8"),
            "layers.0.in_features: Input should be a valid integer (received '8')",
        ),
        (
            lambda raw: raw["layers"][2]["tree"].pop("leaf"),
            "layers.2.tree.leaf: Field required (",
        ),
        (lambda raw: raw.pop("layers"), "layers: Field required ("),
        (
            lambda raw: raw.update(format_version=True),
            "format_version: Input should be a valid integer (received True)",
        ),
    ],
)
def test_fields_that_do_not_fit_the_schema(change: Callable[[Any], object], where: str, run: Path):
    edit(run, change)
    text = message_of(run)
    assert text.startswith(f"{run / RunFolder.PLAN}: {where}")
    assert text.endswith(
        "Mend it by the schema of `treeq-export inspect --schema`, or search again."
    )


def test_another_checkpoint(run: Path):
    assert load_plan(run, CHECKPOINT).checkpoint_sha256 == CHECKPOINT
    assert message_of(run, "f" * 64) == (
        f"{run / RunFolder.PLAN}: belongs to checkpoint 0123456789ab, received ffffffffffff. "
        "Use its checkpoint, or another --out folder."
    )


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        (
            1,
            {"weight": {"bits": 3, "group_size": 3}},
            (
                "transformer_blocks.0.ff.net.2: group_size 3 does not divide in_features 8. "
                "The nearest that do are 2 and 4."
            ),
        ),
        (
            2,
            {"rotation_group": 6},
            (
                "proj_out: rotation_group 6 is no power of two that divides in_features 6. "
                "The nearest that does is 2."
            ),
        ),
        (
            1,
            {"branch": {"b_in": 3, "b_out": 3, "rank": 2}},
            (
                "transformer_blocks.0.ff.net.2: branch b_in 3 does not divide 8. "
                "The nearest that do are 2 and 4."
            ),
        ),
        (
            1,
            {"branch": {"b_in": 2, "b_out": 3, "rank": 3}},
            "transformer_blocks.0.ff.net.2: branch rank 3 exceeds its block 2x4. Use at most 2.",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_layer(
    layer: int, fields: dict[str, Any], message: str, run: Path
):
    edit(run, lambda raw: raw["layers"][layer].update(fields))
    with pytest.raises(FormatError) as caught:
        load_plan(run)
    assert str(caught.value) == message


def test_plans_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.checkpoint_sha256 = "0"  # pyright: ignore[reportAttributeAccessIssue]


# Schema -----------------------------------------------------------------------------------------


def check_keys(value: Any, schema: dict[str, Any], definitions: dict[str, Any], where: str) -> None:
    """Check names, required and surplus keys of every object in `value`."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
    for option in schema.get("anyOf", []):
        if value is not None and option.get("type") != "null":
            check_keys(value, option, definitions, where)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            check_keys(item, schema["items"], definitions, f"{where}.{number}")
    if isinstance(value, dict) and schema.get("additionalProperties") is False:
        assert set(value) <= set(schema["properties"]), where
        assert set(schema["required"]) <= set(value), where
        for key in value:
            check_keys(value[key], schema["properties"][key], definitions, f"{where}.{key}")


def test_the_schema_describes_the_golden_plan():
    schema = json_schema()
    golden = json.loads((GOLDEN / RunFolder.PLAN).read_text())
    assert set(golden) == set(schema["properties"])
    assert schema["additionalProperties"] is False
    check_keys(golden, schema, schema["$defs"], "plan")
    golden["layers"][1]["branch"]["depth"] = 1
    with pytest.raises(AssertionError, match=r"plan\.layers\.1\.branch"):
        check_keys(golden, schema, schema["$defs"], "plan")


def test_the_schema_is_json():
    assert json.loads(json.dumps(json_schema())) == json_schema()
