"""Reading YAML into the types that JSON has."""

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from treeq_export.errors import TreeqError
from treeq_export.reading.files import read_bytes
from treeq_export.reading.limits import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    MAX_YAML_NODES,
    TOO_DEEP,
    NotTextError,
    RefusedError,
    check_count,
    check_number,
    check_size,
    check_value,
    decode,
)

_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path, *, error: type[TreeqError], remedy: str) -> Any:
    """Read a YAML file, or a pipe that gives one.

    Raises:
        TreeqError: It cannot be read, is not YAML or goes beyond a limit; of the class `error`.
    """
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=MAX_YAML_BYTES, pipe=True)
    return parse_yaml(data, path, error=error, remedy=remedy)


def parse_yaml(
    data: bytes | str, where: str | Path, *, error: type[TreeqError], remedy: str
) -> Any:
    """Parse YAML.

    Args:
        data: The text.
        where: What the errors call it.
        error: Class of the errors.
        remedy: A sentence that ends every error.

    Raises:
        TreeqError: Not YAML, or beyond a limit; of the class `error`.

    Example:
        >>> parse_yaml("bits: [2, 4]", "x.yaml", error=TreeqError, remedy="Correct that.")
        {'bits': [2, 4]}
    """
    try:
        check_size(len(data), MAX_YAML_BYTES)
        text = data if isinstance(data, str) else decode(data)
        value = yaml.load(text, _Loader)
        check_value(value, MAX_YAML_NODES)
    except yaml.YAMLError as fault:
        raise error(f"{where}: not YAML: {_problem(fault)}. {remedy}") from fault
    except (NotTextError, OverflowError) as fault:  # or an escape beyond the last character
        raise error(f"{where}: not YAML: {fault}. {remedy}") from fault
    except RefusedError as fault:
        raise error(f"{where}: {fault}. {remedy}") from fault
    except ValueError as fault:
        raise error(f"{where}: not YAML: {fault}. {remedy}") from fault
    return value


def _problem(fault: yaml.YAMLError) -> str:
    """Say in one line where a text stops being YAML."""
    mark = getattr(fault, "problem_mark", None)
    if mark is None:
        return " ".join(str(fault).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(fault, 'problem', '')}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that stops at a limit, and says where for each scalar that it cannot convert."""

    depth = 0
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node inside the limits of depth and count."""
        self.num_nodes += 1
        check_count(self.num_nodes, MAX_YAML_NODES)
        if self.depth > MAX_DEPTH:
            raise RefusedError(TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value, with one error for what the tags' functions raise."""
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and isinstance(node.value, str):
            check_number(node.value)
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RefusedError):
            raise
        except (ValueError, LookupError, AttributeError, TypeError) as fault:
            kind = node.tag.removeprefix(_TAG)
            raise _error(node, f"{node.value!r:.40} is no {kind}; quote it") from fault


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Refuse a key that stands twice, and merges, which can be longer than any memory."""
    seen: set[str] = set()
    for key, _ in mapping.value:
        if key.tag == f"{_TAG}merge":
            raise _error(key, "received a merge (<<), expected the keys themselves")
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _error(key, f"key {key.value!r:.60} stands twice in one mapping")
            seen.add(key.value)


def _error(node: yaml.Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
