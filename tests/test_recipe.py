"""Recipes: defaults, and one line for whatever is wrong with one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from treeq_export.errors import RecipeError
from treeq_export.quant.spec import BranchFormat
from treeq_export.recipe import Recipe, load_recipe

LEAST: dict[str, Any] = {"name": "tiny", "model": {"checkpoint": "checkpoint"}}


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    return path


def write(path: Path, key: str, value: Any) -> None:
    """Write the least recipe with one (dotted) key set."""
    recipe = yaml.safe_load(yaml.safe_dump(LEAST))
    *parents, last = key.split(".")
    node = recipe
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    path.write_text(yaml.safe_dump(recipe))


def message_of(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def every_key(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        for kind in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from every_key(kind, f"{key}.")


# What is right ----------------------------------------------------------------------------------


def test_defaults(recipe_path: Path):
    recipe = load_recipe(recipe_path)
    assert recipe.name == "tiny"
    assert recipe.seed == 0
    assert (recipe.search.weight_bits, recipe.search.activation_bits) == (4, 4)
    assert recipe.search.activation_scale == "auto"
    assert recipe.search.rotation_group == "auto"
    assert recipe.search.group_size is None
    assert recipe.search.branch == BranchFormat(b_in=1, b_out=1, rank=8)
    assert recipe.compile.targets == ["portable", "ort"]
    assert recipe.sampler.scheduler == "flow_match_euler"
    assert recipe.validate_.gates.min_equal_code_fraction == 0.999
    assert recipe.evaluate.gates.max_frechet_ratio is None
    assert recipe.model.conditioning is None


def test_what_a_recipe_dumps_can_be_read_again(recipe_path: Path, tmp_path: Path):
    recipe = load_recipe(recipe_path)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)))
    assert load_recipe(again) == recipe


def test_the_shipped_recipe_loads(digits_folder: Path):
    recipe = load_recipe(digits_folder / "recipe.yaml")
    assert recipe.name == "digits"
    assert Path(recipe.model.checkpoint) == digits_folder.resolve() / "checkpoint"
    for path in (recipe.model.checkpoint, recipe.evaluate.classifier, recipe.evaluate.reference):
        assert path is not None
        assert Path(path).exists()


def test_paths_are_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_path: Path
):
    recipe_path.write_text(
        """
        name: tiny
        model: {checkpoint: ../models/dit, conditioning: text.safetensors}
        evaluate: {classifier: /models/c.onnx, reference: sub/../r.safetensors}
        """
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("recipe.yaml"))
    assert recipe.model.checkpoint == str(tmp_path.parent / "models" / "dit")
    assert recipe.model.conditioning == str(tmp_path / "text.safetensors")
    assert recipe.evaluate.classifier == "/models/c.onnx"
    assert recipe.evaluate.reference == str(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampler.guidance_scale", 2),
        ("search.activation_bits", None),
        ("search.branch", None),
        ("search.branch", {"b_in": 2, "b_out": 4, "rank": 3}),
        ("evaluate.gates.min_psnr_db", 12),
        ("validate.gates.min_layer_sqnr_db", -3.5),
        ("search.exclude", ["*.ff.*", "proj_out"]),
    ],
)
def test_accepted_values(key: str, value: Any, recipe_path: Path):
    write(recipe_path, key, value)
    node: Any = load_recipe(recipe_path).model_dump(by_alias=True)
    for part in key.split("."):
        node = node[part]
    assert node == value


# Overrides --------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_most(recipe_path: Path):
    write(recipe_path, "search.weight_bits", 3)
    recipe = load_recipe(
        recipe_path,
        [
            "search.weight_bits=5",
            "search.weight_bits=6",
            "seed=7",
            "search.branch=null",
            "search.exclude=[a, 'b=c']",
            "evaluate.gates.min_psnr_db=12.5",
            " bench.rounds = 4",
            "validate.batch_size=2",
        ],
    )
    assert recipe.search.weight_bits == 6
    assert recipe.seed == 7
    assert recipe.search.branch is None
    assert recipe.search.exclude == ["a", "b=c"]
    assert recipe.evaluate.gates.min_psnr_db == 12.5
    assert recipe.bench.rounds == 4
    assert recipe.validate_.batch_size == 2


def test_an_override_inside_a_written_section_keeps_its_other_keys(recipe_path: Path):
    write(recipe_path, "search.branch", {"b_in": 2, "b_out": 4, "rank": 3})
    recipe = load_recipe(recipe_path, ["search.branch.rank=1"])
    assert recipe.search.branch == BranchFormat(b_in=2, b_out=4, rank=1)


def test_overridden_paths_are_relative_to_the_recipe(recipe_path: Path):
    recipe = load_recipe(recipe_path, ["model.checkpoint=other"])
    assert recipe.model.checkpoint == str(recipe_path.parent / "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected section.key=value."),
        ("name.first=1", "--set name.first=1: name is no section."),
        (
            "model.checkpoint.path=1",
            "--set model.checkpoint.path=1: checkpoint is no section.",
        ),
        (
            "search.exclude=[a",
            (
                "--set search.exclude=[a: not YAML: line 1, column 3: expected ',' or ']', "
                "but got '<stream end>'. Correct or quote the value."
            ),
        ),
    ],
)
def test_bad_overrides(override: str, message: str, recipe_path: Path):
    assert message_of(recipe_path, (override,)).startswith(message)


def test_a_misspelt_override_is_an_unknown_key(recipe_path: Path):
    text = message_of(recipe_path, ("search.weigth_bits=4",))
    assert text == f"{recipe_path}: search.weigth_bits: unknown key. Did you mean weight_bits?"


def test_an_override_out_of_range(recipe_path: Path):
    text = message_of(recipe_path, ("search.weight_bits=9",))
    assert text.startswith(f"{recipe_path}: search.weight_bits: received 9. Input should be less")


# What is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(every_key()))
def test_every_misspelt_key_is_met_with_the_right_one(key: str, recipe_path: Path):
    write(recipe_path, f"{key}x", 1)
    right = key.rpartition(".")[2]
    assert message_of(recipe_path) == (f"{recipe_path}: {key}x: unknown key. Did you mean {right}?")


def test_all_depths_are_covered_by_every_key():
    assert {key.count(".") for key in every_key()} == {0, 1, 2}
    assert {"search.branch.rank", "validate.gates.min_layer_sqnr_db"} <= set(every_key())


@pytest.mark.parametrize(
    ("key", "known"),
    [
        (
            "zzz",
            (
                "name, seed, model, sampler, search, calibrate, finetune, compile, validate, "
                "bench, evaluate"
            ),
        ),
        ("model.zzz", "checkpoint, variant, latent_size, num_text_tokens, conditioning"),
        ("search.branch.zzz", "b_in, b_out, rank"),
        ("evaluate.gates.zzz", "max_frechet_ratio, min_class_accuracy, min_psnr_db"),
    ],
)
def test_an_unknown_key_lists_the_known_ones(key: str, known: str, recipe_path: Path):
    write(recipe_path, key, 1)
    assert message_of(recipe_path) == f"{recipe_path}: {key}: unknown key. Known keys: {known}."


def test_an_unknown_key_is_told_before_other_problems(recipe_path: Path):
    recipe_path.write_text("{seed: -1, modle: {checkpoint: c}, name: a}")
    assert message_of(recipe_path) == f"{recipe_path}: modle: unknown key. Did you mean model?"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "seed: received -1. Input should be greater than or equal to 0."),
        ("search.weight_bits", 1, "search.weight_bits: received 1. Input should be greater"),
        ("search.weight_bits", 9, "search.weight_bits: received 9. Input should be less"),
        ("search.activation_bits", 9, "search.activation_bits: received 9. Input should be less"),
        (
            "search.branch",
            {"b_in": 1, "b_out": 1, "rank": 0},
            "search.branch.rank: received 0. Input should be greater",
        ),
        ("search.rotation_group", 0, "search.rotation_group: received 0. Input should be"),
        ("search.rotation_group", "all", "search.rotation_group: received 'all'. Input should be"),
        ("model.latent_size", [8, 16], "model.latent_size: received [8, 16]. Value error, Latents"),
        ("model.latent_size", "8x16", "model.latent_size: received '8x16'. Value error, Latents"),
        ("model.latent_size", 1.5, "model.latent_size: received 1.5. Input should be a valid int"),
        (
            "search.strategy",
            "best",
            "search.strategy: received 'best'. Input should be",
        ),
        ("sampler.guidance_scale", 0.5, "sampler.guidance_scale: received 0.5. Input should be"),
        ("sampler.guidance_scale", float("nan"), "sampler.guidance_scale: received nan. Input"),
        ("sampler.steps", 0, "sampler.steps: received 0. Input should be greater"),
        ("compile.targets", [], "compile.targets: received []. List should have at least 1 item"),
        ("compile.targets", ["onnx"], "compile.targets.0: received 'onnx'. Input should"),
        ("compile.max_batch", 1, "compile.max_batch: received 1. Input should be greater"),
        ("bench.rounds", 2, "bench.rounds: received 2. Input should be greater than or equal to 3"),
        ("bench.batch_sizes", [2, 0], "bench.batch_sizes.1: received 0. Input should be greater"),
        (
            "validate.gates.min_equal_code_fraction",
            1.5,
            "validate.gates.min_equal_code_fraction: received 1.5. Input should be less",
        ),
        (
            "evaluate.gates.max_frechet_ratio",
            0,
            "evaluate.gates.max_frechet_ratio: received 0. Input should be greater than 0.",
        ),
        ("evaluate.num_samples", 1, "evaluate.num_samples: received 1. Input should be greater"),
    ],
)
def test_values_out_of_range(key: str, value: Any, message: str, recipe_path: Path):
    write(recipe_path, key, value)
    assert message_of(recipe_path).startswith(f"{recipe_path}: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 3, "name: received 3. Input should be a valid string."),
        ("seed", "0", "seed: received '0'. Input should be a valid integer."),
        ("seed", True, "seed: received True. Input should be a valid integer."),
        ("search.weight_bits", 4.0, "search.weight_bits: received 4.0. Input should be a valid"),
        ("search.exclude", "a", "search.exclude: received 'a'. Input should be a valid list."),
        ("search.branch", 8, "search.branch: received 8. Input should be a valid dictionary"),
        ("search.branch", {"b_in": 1, "b_out": 1}, "search.branch.rank: missing. Add it."),
        ("search", None, "search: received None. Input should be a valid dictionary"),
        ("model", {}, "model.checkpoint: missing. Add it."),
        ("model", "c", "model: received 'c'. Input should be a valid dictionary"),
        ("model.checkpoint", None, "model.checkpoint: received None. Input should be a valid str"),
        ("bench.batch_sizes", 2, "bench.batch_sizes: received 2. Input should be a valid list."),
        ("sampler.guidance_scale", "big", "sampler.guidance_scale: received 'big'. Input should"),
    ],
)
def test_values_of_a_wrong_type(key: str, value: Any, message: str, recipe_path: Path):
    write(recipe_path, key, value)
    assert message_of(recipe_path).startswith(f"{recipe_path}: {message}")


def test_missing_sections(recipe_path: Path):
    recipe_path.write_text("name: tiny")
    assert message_of(recipe_path) == f"{recipe_path}: model: missing. Add it."


def test_a_long_value_is_cut(recipe_path: Path):
    write(recipe_path, "seed", "x" * 1000)
    assert len(message_of(recipe_path)) < len(str(recipe_path)) + 140


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "NoneType"), ("- a\n- b\n", "list"), ("just words", "str"), ("3", "int")],
)
def test_what_is_no_mapping(text: str, kind: str, recipe_path: Path):
    recipe_path.write_text(text)
    assert message_of(recipe_path) == (
        f"{recipe_path}: received {kind}, expected sections. "
        "Write at least name: and model:, with its checkpoint:."
    )


@pytest.mark.parametrize(
    "data",
    [b"name: [a", b"name: a: b", b"a: 1\n---\nb: 2\n", b"name: \xff\xfe", b"\tname: a", b"a: *b"],
)
def test_what_is_no_yaml(data: bytes, recipe_path: Path):
    recipe_path.write_bytes(data)
    assert message_of(recipe_path).startswith(f"{recipe_path}: not YAML: ")


def test_nothing_is_executed(recipe_path: Path):
    recipe_path.write_text("name: !!python/object/apply:os.getcwd []\nmodel: {checkpoint: c}")
    assert "could not determine a constructor" in message_of(recipe_path)


@pytest.mark.parametrize("key", ["1", "null", "true"])
def test_keys_that_are_no_strings(key: str, recipe_path: Path):
    recipe_path.write_text(f"name: a\nmodel: {{checkpoint: c}}\n{key}: x")
    assert ", expected a text; quote it. Correct that" in message_of(recipe_path)


def test_a_missing_file(tmp_path: Path):
    path = tmp_path / "nothing.yaml"
    assert message_of(path) == (
        f"{path}: cannot be read (No such file or directory). "
        "Correct that, or give the path of a YAML file."
    )


def test_a_folder(tmp_path: Path):
    assert message_of(tmp_path) == (
        f"{tmp_path}: cannot be read (Is a directory). "
        "Correct that, or give the path of a YAML file."
    )


def test_recipes_are_immutable(recipe_path: Path):
    recipe = load_recipe(recipe_path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
