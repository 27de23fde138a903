import importlib.util
import json
import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from treeq_export import __version__, doctor
from treeq_export.cli import main
from treeq_export.doctor import (
    PACKAGES,
    REQUIRED,
    RUNTIME_MODULES,
    Finding,
    examine,
    findings_to_json,
    is_healthy,
)

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


@pytest.fixture(autouse=True)
def no_children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests start no process per runtime; those of TestRegistration do."""
    if request.cls is not TestRegistration:
        monkeypatch.setattr("treeq_export.doctor.RUNTIME_MODULES", {})


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

    @pytest.mark.parametrize(
        ("saturates", "sets", "found"),
        [
            (False, ["avx2", "avx512_vnni"], "exact in ONNX Runtime (VNNI)"),
            (True, ["avx2", "fma"], "saturate in ONNX Runtime (no VNNI)"),
        ],
    )
    def test_8_bit_products(
        self, saturates: bool, sets: list[str], found: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("treeq_export.doctor.products_saturate", lambda: saturates)
        monkeypatch.setattr("treeq_export.doctor.read_cpu", lambda: ("A Processor", sets))
        assert finding_of("8-bit products").found == found

    def test_8_bit_products_are_tried(self) -> None:
        assert "in ONNX Runtime" in str(finding_of("8-bit products").found)

    def test_runtime_that_cannot_multiply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> bool:
            raise RuntimeError("no such\nkernel")

        monkeypatch.setattr("treeq_export.doctor.products_saturate", fail)
        finding = finding_of("8-bit products")
        assert finding.found is None
        assert finding.problem == "ONNX Runtime cannot multiply: no such kernel"

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
        fields = {"name", "found", "purpose", "remedy", "required", "problem"}
        assert set(entries[0]) == fields


class TestGpu:
    def test_gpu_packages_are_optional(self) -> None:
        findings = {finding.name: finding for finding in examine()}
        for name in ("triton", "polygraphy", "cuda-python", "tensorrt-rtx"):
            assert findings[name].found
            assert not findings[name].required

    def test_module_inside_a_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = ("nothing_such.bindings", "nothing-such", "", "pip install 'treeq-export[rtx]'")
        monkeypatch.setattr(doctor, "PACKAGES", (entry,))
        assert finding_of("nothing-such").found is None

    def test_kernels_of_a_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(doctor.KERNELS_VARIABLE, raising=False)
        missing = finding_of("gpu kernels")
        assert missing.found is None
        assert "python -m treeq_gpu.ahead --out" in missing.remedy
        monkeypatch.setenv(doctor.KERNELS_VARIABLE, str(tmp_path))
        assert finding_of("gpu kernels").problem.endswith("kernels.json is missing or malformed")
        entry = {"name": "a", "file": "a.cubin", "sha256": "0", "function": "f"}
        entry |= {"shared_bytes": 0, "num_warps": 4, "params": []}
        kernels = [entry | {"arch": arch} for arch in ("sm_90", "sm_80", "sm_80")]
        (tmp_path / "kernels.json").write_text(json.dumps({"kernels": kernels}))
        assert finding_of("gpu kernels").found == f"3 for sm_80, sm_90, {tmp_path}"
        (tmp_path / "kernels.json").write_text('{"kernels": 3}')
        assert finding_of("gpu kernels").found is None

    def test_plugin_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
        assert finding_of(doctor.PLUGIN_LIBRARY).found is None
        assert "TENSORRT_ROOT=" in finding_of(doctor.PLUGIN_LIBRARY).remedy
        (tmp_path / doctor.PLUGIN_LIBRARY).touch()
        assert finding_of(doctor.PLUGIN_LIBRARY).found == str(tmp_path / doctor.PLUGIN_LIBRARY)

    @pytest.mark.parametrize(
        ("script", "found", "problem"),
        [
            ("echo 'Cuda compilation tools, release 13.0, V13.0.48'", "13.0, ", ""),
            ("exit 1", None, "does not say its version"),
        ],
    )
    def test_nvcc(
        self,
        script: str,
        found: str | None,
        problem: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        put_program(tmp_path, "nvcc", script, monkeypatch)
        finding = finding_of("nvcc")
        assert finding.found == (f"{found}{tmp_path / 'nvcc'}" if found else None)
        assert finding.problem.endswith(problem)

    def test_without_nvcc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        finding = finding_of("nvcc")
        assert (finding.found, finding.problem) == (None, "")
        assert finding.remedy

    def test_driver_by_the_kernel_s_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "version"
        file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue\n")
        monkeypatch.setattr(doctor, "_DRIVER_FILE", file)
        assert finding_of("nvidia driver").found == "580.159.04"

    @pytest.mark.parametrize(
        ("script", "found"), [("echo 580.159.04", "580.159.04"), ("echo failed; exit 9", None)]
    )
    def test_driver_by_its_tool(
        self,
        script: str,
        found: str | None,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        put_program(tmp_path, "nvidia-smi", script, monkeypatch)
        monkeypatch.setattr(doctor, "_DRIVER_FILE", tmp_path / "missing")
        assert finding_of("nvidia driver").found == found


def put_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script before everything else in PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


class TestFloors:
    @pytest.mark.parametrize(
        ("found", "floor", "problem"),
        [
            ("1.20.1", "1.21", "version 1.20.1, expected at least 1.21"),
            ("1.9.0", "1.21", "version 1.9.0, expected at least 1.21"),
            ("1.21.0", "1.21", ""),
            ("1.21", "1.21", ""),
            ("2.13.0+cpu", "2.11", ""),
            ("unknown version", "2.11", ""),
        ],
    )
    def test_a_version_below_the_floor(
        self, monkeypatch: pytest.MonkeyPatch, found: str, floor: str, problem: str
    ) -> None:
        wanted = ["onnxscript>=9", "onnx-ir>=9", f"onnx>={floor}", "ray>=9; extra == 'ray'"]
        monkeypatch.setattr(doctor, "requires", lambda _: wanted)
        assert doctor._find_age("onnx", found) == problem
        monkeypatch.setattr(doctor, "version_of", lambda _: found)
        finding = next(f for f in doctor._examine_packages() if f.name == "onnx")
        assert (finding.found, finding.problem) == (None if problem else found, problem)
        assert is_healthy([finding]) == (not problem)


class TestRegistration:
    def test_plugins_register_in_every_installed_runtime(self) -> None:
        findings = [f for f in examine() if f.name.startswith("plugins in ")]
        installed = [n for n, m in RUNTIME_MODULES.items() if importlib.util.find_spec(m)]
        assert [finding.name for finding in findings] == [f"plugins in {n}" for n in installed]
        assert "plugins in tensorrt-rtx" in {finding.name for finding in findings}
        for finding in findings:
            assert str(finding.found).startswith("QLinear, Monarch from ")
            assert not finding.required

    @pytest.mark.parametrize(
        ("script", "problem"),
        [
            ("import os; os.abort()", "status -6: no message"),
            ("import sys; sys.exit('no such plugin')", "status 1: no such plugin"),
            ("import time; time.sleep(60)", "no answer in 0.5 s"),
        ],
    )
    def test_a_runtime_that_fails_is_a_finding(
        self, script: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "fake_registration.py").write_text(script)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(doctor, "_REGISTER", "fake_registration")
        monkeypatch.setattr(doctor, "RUNTIME_MODULES", {"tensorrt-rtx": "tensorrt_rtx"})
        with doctor.registrations() as children:
            [(name, child)] = children.items()
            timeout = 0.5 if "sleep" in script else 30.0
            finding = doctor._examine_registration(name, child, timeout)
        assert (finding.found, finding.problem) == (None, problem)
        assert "treeq-export[rtx]" in finding.remedy
        assert child.returncode is not None
        assert is_healthy([finding])

    def test_no_runtime_no_process(self, hide: Any) -> None:
        hide(*RUNTIME_MODULES.values())
        with doctor.registrations() as children:
            assert children == {}


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
