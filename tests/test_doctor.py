import importlib.util
import json
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from treeq_export import __version__, doctor
from treeq_export.cli import main
from treeq_export.doctor import PACKAGES, REQUIRED, Finding, examine, findings_to_json, is_healthy

OPTIONAL = [package for module, package, _, _ in PACKAGES if module not in REQUIRED]


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: module names -> they count as not installed."""
    find_spec = importlib.util.find_spec

    def hide(*modules: str) -> None:
        def find(name: str) -> ModuleSpec | None:
            return None if name in modules else find_spec(name)

        monkeypatch.setattr("treeq_export.doctor.importlib.util.find_spec", find)

    return hide


def finding_of(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


class TestExamine:
    def test_this_machine_is_healthy(self) -> None:
        findings = examine()
        assert is_healthy(findings)
        assert finding_of("treeq-export").found == __version__
        assert "core" in str(finding_of("cpu").found)
        assert {finding.name for finding in findings} >= {"torch", "onnxruntime", "gpu", "python"}

    def test_missing_required_package(self, hide: Any) -> None:
        hide("onnxruntime")
        finding = finding_of("onnxruntime")
        assert finding.found is None
        assert finding.remedy == "pip install treeq-export"
        assert not is_healthy(examine())

    def test_works_without_torch(self, hide: Any) -> None:
        hide("torch")
        assert finding_of("torch").found is None
        assert finding_of("gpu").found is None

    def test_missing_optional_packages_are_no_illness(self, hide: Any) -> None:
        hide(*(module for module, *_ in PACKAGES if module not in REQUIRED))
        findings = {finding.name: finding for finding in examine()}
        assert all(findings[name].found is None for name in OPTIONAL)
        assert all("treeq-export[" in findings[name].remedy for name in OPTIONAL)
        assert is_healthy(list(findings.values()))

    def test_package_under_its_gpu_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        versions = {"onnxruntime-gpu": "9.9"}
        monkeypatch.setattr(doctor, "version_of", versions.get)
        assert finding_of("onnxruntime").found == "9.9"
        assert finding_of("torch").found == "unknown version"

    def test_gpu_by_its_architecture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        assert finding_of("gpu").found == "NVIDIA H200, sm_90"

    def test_cpu_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert finding_of("gpu").found is None

    def test_json_holds_every_field(self) -> None:
        entries = findings_to_json(examine())
        assert json.loads(json.dumps(entries)) == entries
        assert set(entries[0]) == {"name", "found", "purpose", "remedy", "required"}


class TestCommand:
    def test_table(self, hide: Any) -> None:
        hide("tritonclient")
        result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert "treeq-export doctor" in result.stdout
        assert "pip install 'treeq-export[serve]'" in result.stdout
        assert result.stderr == ""

    def test_json(self) -> None:
        result = CliRunner().invoke(main, ["doctor", "--json"])
        assert result.exit_code == 0
        assert json.loads(result.stdout) == findings_to_json(examine())

    def test_illness_is_one_line_after_the_table(self, hide: Any) -> None:
        hide("onnx", "diffusers")
        result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
        assert result.exit_code == 1
        assert "missing" in result.stdout
        assert "pip install treeq-export" in result.stdout
        assert result.stderr == (
            "treeq-export: doctor: missing diffusers, onnx. "
            "Install with the commands of the table.\n"
        )
