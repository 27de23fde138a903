"""Reading a recipe: YAML, overrides, and one line for what is wrong."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from treeq_export.errors import RecipeError
from treeq_export.reading import parse_yaml, read_yaml
from treeq_export.recipe.sections import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and make its paths absolute.

    Args:
        path: The YAML file.
        overrides: "section.key=value" assignments, the values YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: Unreadable, not YAML, an unknown key, or a value out of range.
    """
    raw = read_yaml(
        path, error=RecipeError, remedy="Correct that, or give the path of a YAML file."
    )
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: received {type(raw).__name__}, expected sections. "
            "Write at least name: and model:, with its checkpoint:."
        )
    return _with_absolute_paths(_validate(raw, overrides, str(path)), path.absolute().parent)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with some values replaced.

    Args:
        recipe: A checked recipe with absolute paths.
        overrides: "section.key=value" assignments, the values YAML; paths relative to the current
            folder.

    Raises:
        RecipeError: An unknown key, or a value out of range.
    """
    raw = recipe.model_dump(mode="json", by_alias=True)
    return _with_absolute_paths(_validate(raw, overrides, "--set"), Path.cwd())


def change_section(recipe: Recipe, section: str, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some keys of one section replaced.

    Args:
        recipe: A checked recipe.
        section: Name of the section.
        values: The values by key, as YAML would give them.

    Raises:
        RecipeError: An unknown key, or a value out of range.
    """
    raw = recipe.model_dump(mode="json", by_alias=True)
    return make_recipe(raw | {section: raw[section] | dict(values)})


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Return the recipe of values by section, as YAML would give them; paths stay as they are.

    Raises:
        RecipeError: An unknown key, or a value out of range.
    """
    return _validate(values, (), "settings")


def _validate(raw: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(error)}") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override}: expected section.key=value.")
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent} is no section.")
        node = child
    node[last] = parse_yaml(
        value, f"--set {override:.60}", error=RecipeError, remedy="Correct or quote the value."
    )


def _first_problem(error: ValidationError) -> str:
    """Say the first problem in one line, with the nearest known key for a misspelt one."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(_field_path(first["loc"]))
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
        return f"{where}: unknown key. {hint}"
    if first["type"] == "missing":
        return f"{where}: missing. Add it."
    return f"{where}: received {first['input']!r:.60}. {first['msg']}."


def _field_path(location: Sequence[int | str]) -> list[str]:
    """Return a place in the recipe without what pydantic adds for the members of a union."""
    path = [str(part) for part in location]
    while (
        len(path) > 1
        and isinstance(location[len(path) - 1], str)
        and (path[-1].startswith("literal[") or path[-1].startswith("constrained-"))
    ):
        path.pop()
    return path


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Return the keys of the section at `location`."""
    section: Any = Recipe
    for part in location:
        for name, field in section.model_fields.items():
            if part in (name, field.alias):
                kinds = getattr(field.annotation, "__args__", (field.annotation,))
                section = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return [field.alias or name for name, field in section.model_fields.items()]


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str | None) -> str | None:
        return None if path is None else str((folder / Path(path).expanduser()).resolve())

    model = recipe.model.model_copy(
        update={
            "checkpoint": absolute(recipe.model.checkpoint),
            "conditioning": absolute(recipe.model.conditioning),
        }
    )
    evaluate = recipe.evaluate.model_copy(
        update={
            "classifier": absolute(recipe.evaluate.classifier),
            "reference": absolute(recipe.evaluate.reference),
        }
    )
    return recipe.model_copy(update={"model": model, "evaluate": evaluate})
