"""All kernels compiled for all architectures without a GPU, and what their SASS has to be."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from treeq_gpu import ahead, audit
from treeq_gpu.instantiations import ARCHITECTURES, INSTANTIATIONS

COMMITTED = Path(audit.__file__).parents[1] / "audit.json"
Compiled = Callable[[], dict[str, Any]]


def entry_of(manifest: dict[str, Any], name: str, architecture: str) -> dict[str, Any]:
    """Return a copy of one kernel's entry."""
    found = [e for e in manifest["kernels"] if (e["name"], e["arch"]) == (name, architecture)]
    assert len(found) == 1
    return copy.deepcopy(found[0])


@pytest.mark.slow
def test_every_kernel_compiles_and_passes_the_audit(compiled: Compiled):
    kernels = compiled()["kernels"]
    assert {(e["name"], e["arch"]) for e in kernels} == {
        (name, architecture) for name in INSTANTIATIONS for architecture in ARCHITECTURES
    }
    failed = {(e["name"], e["arch"]): p for e in kernels if (p := audit.problems_of(e))}
    assert failed == {}


@pytest.mark.slow
def test_products_use_the_instruction_meant(compiled: Compiled):
    manifest = compiled()
    for bits in range(2, 9):
        for architecture in ARCHITECTURES:
            wide = entry_of(manifest, f"qlinear_w{bits}_wide_fp16", architecture)
            token = entry_of(manifest, f"qlinear_w{bits}_token_fp16", architecture)
            meant = "IGMMA" if architecture == "sm_90" else "IMMA"
            assert set(wide["audit"]["mma"]) == {meant}
            assert set(token["audit"]["mma"]) == {"IMMA"}
            assert wide["audit"]["loop_local"] == token["audit"]["loop_local"] == 0


@pytest.mark.slow
def test_parameters_are_the_kernels_and_then_scratch(compiled: Compiled):
    for entry in compiled()["kernels"]:
        own = [list(pair) for pair in INSTANTIATIONS[entry["name"]].params]
        assert entry["params"][: len(own)] == own
        assert all(kind == "*i8" for _, kind in entry["params"][len(own) :])
        assert entry["function"] == INSTANTIATIONS[entry["name"]].kernel
        assert entry["num_warps"] == INSTANTIATIONS[entry["name"]].num_warps


@pytest.mark.slow
def test_second_run_compiles_nothing(compiled: Compiled, monkeypatch: pytest.MonkeyPatch):
    first = compiled()
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", None)
    assert compiled() == first


@pytest.mark.slow
def test_committed_table_is_that_of_these_kernels(compiled: Compiled):
    manifest = compiled()
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != manifest["triton"]:
        assert len(committed["kernels"]) == len(manifest["kernels"])  # another compiler's numbers
        return
    kept = set(committed["kernels"][0])
    assert committed["kernels"] == [
        {key: value for key, value in entry.items() if key in kept} for entry in manifest["kernels"]
    ]


@pytest.mark.slow
def test_command_compiles_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["--out", str(tmp_path), "--arch", "sm_89", "--only", "finish_fp*", "--jobs", "1"]
    assert ahead.main(command) == 0
    assert capsys.readouterr().out == f"2 kernels in {tmp_path}\n"
    manifest = json.loads((tmp_path / "kernels.json").read_text())
    for entry in manifest["kernels"]:
        assert (tmp_path / entry["file"]).read_bytes()[:4] == b"\x7fELF"
        assert (tmp_path / entry["file"]).with_suffix(".ptx").read_text().count(".entry") == 1
    assert audit.main([str(tmp_path), "--json", str(tmp_path / "table.json")]) == 0
    assert "2 of 2 kernels pass" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "table.json").read_text()

    (tmp_path / manifest["kernels"][0]["file"]).write_bytes(b"broken")
    again: list[str] = []
    compile_kernel = ahead.compile_kernel

    class Inline:
        """A pool that runs in this process, so that calls are counted."""

        def __init__(self, _workers: int) -> None: ...
        def __enter__(self) -> "Inline":
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, _function: object, names: list[str], *rest: list[Any], chunksize: int) -> Any:
            again.extend(names)
            return [compile_kernel(*args) for args in zip(names, *rest, strict=True)]

    monkeypatch.setattr(ahead, "ProcessPoolExecutor", Inline)
    assert ahead.main(command) == 0
    assert again == [manifest["kernels"][0]["name"]]
    assert json.loads((tmp_path / "kernels.json").read_text()) == manifest


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--arch", "sm_75", "--arch sm_75 names nothing known. Choose from: sm_80, sm_86"),
        ("--only", "qlinear_w9*", "--only qlinear_w9* names nothing known"),
    ],
)
def test_unknown_names_are_refused(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert ahead.main(["--out", str(tmp_path / "out"), option, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_that_differ_are_refused():
    instantiation = INSTANTIATIONS["finish_fp16"]
    ptx = ".visible .entry finish_kernel(\n\t.param .u64 .ptr a,\n\t.param .u32 b\n)\n{}"
    with pytest.raises(RuntimeError, match="finish_fp16: the PTX has parameters"):
        ahead.params_of(instantiation, ptx)


def sound_entry(name: str = "qlinear_w3_wide_fp16", architecture: str = "sm_90") -> dict[str, Any]:
    """Return an entry that the audit passes."""
    meant = list(audit.expected_mma(INSTANTIATIONS[name], architecture))
    numbers = {"mma_meant": meant, "mma": {"IGMMA": 4}, "loop_mma": 4, "loop_local": 0}
    numbers["integer_per_4_codes"] = 7.6
    return {"name": name, "arch": architecture, "shared_bytes": 78_000, "audit": numbers}


def test_audit_names_what_is_wrong():
    assert audit.problems_of(sound_entry()) == []
    for changes, problem in [
        ({"mma": {"IMMA": 64}}, "no IGMMA"),
        ({"loop_mma": 0}, "no main loop"),
        ({"loop_local": 3}, "3 spills in the main loop"),
        ({"integer_per_4_codes": 37.2}, "37.2 integer instructions per 4 codes, budget 12.5"),
    ]:
        entry = sound_entry()
        entry["audit"].update(changes)
        assert audit.problems_of(entry) == [problem]
    entry = sound_entry("qlinear_w3_wide_fp16", "sm_89") | {"shared_bytes": 102_400}
    assert audit.problems_of(entry) == [
        "no IMMA",
        "102400 bytes of shared memory, limit 101376",
    ]


def test_audit_command_fails_with_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entry: dict[str, Any] = {**sound_entry(), "registers": 128, "stack_bytes": 88}
    entry["audit"].update(loop_instructions=198, loop_integer=122, loop_local=2)
    (tmp_path / "kernels.json").write_text(json.dumps({"triton": "3.9.0", "kernels": [entry]}))
    assert audit.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "qlinear_w3_wide_fp16 for sm_90: 2 spills in the main loop",
        "0 of 1 kernels pass",
    ]


LISTING = """
        .text.kernel:
        /*0000*/                   MOV R0, RZ ;
.L_x_0:
        /*0010*/                   IMMA.16832.S8.S8 R0, R4, R8, R0 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDL R1, [R2] ;
.L_x_2:
        /*0040*/                   IMMA.16832.S8.S8 R0, R4, R8, R0 ;
        /*0050*/              @UP1 IMMA.16832.S8.S8 R0, R4, R8, R0 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""


def test_main_loop_is_the_shortest_around_most_products():
    instructions = audit.parse_sass(LISTING)
    assert [i.address for i in instructions] == [16 * i for i in range(10)]
    assert [i.target for i in instructions if i.opcode == "BRA"] == [0x10, 0x40, 0x30, 0x90]
    assert audit.find_main_loop(instructions) == instructions[4:7]
    assert audit.find_main_loop(instructions[:1]) == []
    assert audit.count_opcodes(instructions)["IMMA"] == 3


def test_interpreted_kernels_leave_the_compiled_ones_alone(gpu: ModuleType):
    from treeq_gpu import launch
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert launch is not gpu
    for name, kernel in launch.KERNELS.items():
        assert isinstance(kernel, JITFunction)
        assert isinstance(gpu.KERNELS[name], InterpretedFunction)
