"""No module reads JSON, YAML, safetensors or graphs by itself: treeq_export/reading does."""

import ast
from pathlib import Path

import treeq_export

PACKAGE = Path(treeq_export.__file__).parent
# Where a call of this name is not a reader of files that others may have written.
ALLOWED = {
    "reading/": "the one place",
    "runners/graph_file.py": "the one place for graphs",
    "model/torch_file.py": "weights_only, the one place for .pt files",
    "client/answers.py": "answers of servers, with limits of their own",
    "client/web.py": "requests, whose size aiohttp limits",
    "finetune/state.py": "a value in the header of a file that was read in the one place",
    "report/summary.py": "parses what pydantic has just written",
    "records/base.py": "likewise",
}
BANNED = {
    "json.load",
    "json.loads",
    "yaml.load",
    "yaml.safe_load",
    "onnx.load",
    "onnx.load_model",
    "onnx_ir.load",
    "ir.load",
    "torch.load",
    "safe_open",
    "safetensors.safe_open",
    "load_file",
    "model_validate_json",
    "validate_json",
    "ParseFromString",
}


def _calls(tree: ast.AST) -> dict[str, int]:
    """Return the called names, with and without what stands before the last dot, by line."""
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found.setdefault(name, node.lineno)
            found.setdefault(name.rpartition(".")[2], node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.setdefault(f"{node.module}.{alias.name}", node.lineno)
    return found


def _violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(tuple(ALLOWED)):
            calls = _calls(ast.parse(path.read_text()))
            found += [f"{name}:{calls[call]}: {call}" for call in sorted(BANNED & calls.keys())]
    return found


def test_no_reader_beside_the_one() -> None:
    assert _violations(PACKAGE) == []


def test_a_new_reader_is_found(tmp_path: Path) -> None:
    for number, line in enumerate(
        (
            "import json; json.loads('1')",
            "from json import loads",
            "import yaml; yaml.safe_load('1')",
            "import onnx_ir as ir; ir.load('x')",
            "from safetensors import safe_open; safe_open('x', 'np')",
            "from safetensors.numpy import load_file; load_file('x')",
            "Record.model_validate_json(text)",
        )
    ):
        (tmp_path / f"module{number}.py").write_text(line)
    assert len({line.partition(":")[0] for line in _violations(tmp_path)}) == 7
