"""The blocks of docs/api.md run, in order, in one program."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.export_cache import export_once
from treeq_export import api

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "export_graph", export_once)
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "4 4\n" in capsys.readouterr().out
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert written == {"build/model.onnx", "build/plan/plan.json", "build/plan/plan.safetensors"}
