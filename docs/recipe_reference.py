"""Writes docs/recipe.md from the recipe's models: `python docs/recipe_reference.py`.

The models are the one place that says what a key means: names, defaults and ranges come from their
fields, sentences from the `Attributes` of their docstrings. tests/test_docs.py compares the page.
"""

import inspect
import re
import types
import typing
from pathlib import Path

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from treeq_export.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"
INTRODUCTION = """\
# Recipe

A recipe is one YAML file. Only `name` and `model.checkpoint` have no default. Paths are relative to
the recipe. `--set KEY=VALUE` overrides a key, for example `--set search.budget.weight_bits=3`. An
unknown key, a wrong type or a number out of range ends the command with one line that names the
key.

This page is generated from the recipe's models by `python docs/recipe_reference.py`.
"""


def attributes_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the sentences of a docstring's `Attributes` by field, of its bases too."""
    sentences: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        if "Attributes:\n" not in text or not issubclass(owner, BaseModel):
            continue
        entries = text.split("Attributes:\n")[1]
        for name, sentence in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", entries, re.MULTILINE):
            sentences[name] = " ".join(sentence.split())
    return sentences


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the models that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def limits_of(metadata: typing.Iterable[object]) -> list[str]:
    """Return a type's limits as text, such as ">= 1"."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found: list[str] = []
    for each in metadata:
        parts = each.metadata if isinstance(each, FieldInfo) else [each]
        for part in parts:
            if isinstance(part, annotated_types.GroupedMetadata):
                continue
            found += [
                f"{sign} {getattr(part, at):g}" for at, sign in signs.items() if hasattr(part, at)
            ]
    return found


def describe_type(annotation: object, metadata: typing.Iterable[object] = ()) -> str:
    """Return a type in the words of YAML, with its limits."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    words = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null"}
    name = words.get(typing.cast(type, annotation), str(annotation))
    limits = limits_of(metadata)
    return f"{name} {', '.join(limits)}" if limits else name


def describe_default(field: FieldInfo) -> str:
    """Return a field's default as YAML would spell it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    spelt = {None: "null", True: "true", False: "false"}
    text = spelt[value] if value is None or isinstance(value, bool) else str(value)
    return f"`{text.replace(chr(39), '')}`"


def describe(model: type[BaseModel], path: str) -> str:
    """Return the table of one section and, behind it, those of the sections in it."""
    sentences = attributes_of(model)
    heading = f"\n## `{path}`\n" if path else "\n## The file\n"
    lines = [heading, (inspect.cleandoc(model.__doc__ or "").split("\n\n")[0]).replace("\n", " ")]
    lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        kind = describe_type(field.annotation, field.metadata).replace("|", "\\|")
        meaning = sentences.get(name, "").replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | {describe_default(field)} | {meaning} |")
        inner = f"{path}.{key}" if path else key
        nested += [describe(each, inner) for each in models_in(field.annotation)]
    return "\n".join([*lines, *nested])


def make_page() -> str:
    """Return the page."""
    return f"{INTRODUCTION}{describe(Recipe, '')}\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
