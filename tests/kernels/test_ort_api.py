"""kernels/ort/api.h against ONNX Runtime's own header, and what our libraries show to others."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.required import skip_or_fail
from treeq_export.runners.cpu_kernels import KERNELS_LIBRARY, ORT_LIBRARY, find_library

ORT_SOURCES = Path(__file__).parents[2] / "kernels" / "ort"
HEADER = "onnxruntime_c_api.h"
# Names in the table with an underscore that ours do without.
UNDERSCORED = {
    "CustomOpDomainAdd": "CustomOpDomain_Add",
    "KernelInfoGetAttributeFloat": "KernelInfoGetAttribute_float",
    "KernelInfoGetAttributeInt64": "KernelInfoGetAttribute_int64",
    "KernelInfoGetAttributeString": "KernelInfoGetAttribute_string",
    "KernelInfoGetConstantInputTensor": "KernelInfoGetConstantInput_tensor",
    "KernelInfoGetInputCount": "KernelInfo_GetInputCount",
    "KernelInfoGetInputName": "KernelInfo_GetInputName",
    "KernelInfoGetNodeName": "KernelInfo_GetNodeName",
    "KernelContextGetInputCount": "KernelContext_GetInputCount",
    "KernelContextGetOutputCount": "KernelContext_GetOutputCount",
    "KernelContextGetInput": "KernelContext_GetInput",
    "KernelContextGetOutput": "KernelContext_GetOutput",
    "KernelContextParallelFor": "KernelContext_ParallelFor",
}
MEMBERS = {
    "version": "version",
    "create_kernel": "CreateKernel",
    "get_name": "GetName",
    "get_provider": "GetExecutionProviderType",
    "get_input_type": "GetInputType",
    "get_input_count": "GetInputTypeCount",
    "get_output_type": "GetOutputType",
    "get_output_count": "GetOutputTypeCount",
    "compute": "KernelCompute",
    "destroy": "KernelDestroy",
    "get_input_characteristic": "GetInputCharacteristic",
    "get_output_characteristic": "GetOutputCharacteristic",
    "get_input_memory": "GetInputMemoryType",
    "get_variadic_input_min": "GetVariadicInputMinArity",
    "get_variadic_input_homogeneity": "GetVariadicInputHomogeneity",
    "get_variadic_output_min": "GetVariadicOutputMinArity",
    "get_variadic_output_homogeneity": "GetVariadicOutputHomogeneity",
    "create_kernel_v2": "CreateKernelV2",
    "compute_v2": "KernelComputeV2",
    "infer_shape": "InferOutputShapeFn",
    "get_start_version": "GetStartVersion",
    "get_end_version": "GetEndVersion",
    "get_may_inplace": "GetMayInplace",
    "release_may_inplace": "ReleaseMayInplace",
    "get_alias_map": "GetAliasMap",
    "release_alias_map": "ReleaseAliasMap",
}
CONSTANTS = {
    "kInvalidArgument": "ORT_INVALID_ARGUMENT",
    "kFloat": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT",
    "kInt32": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32",
    "kRequired": "INPUT_OUTPUT_REQUIRED",
    "kOptional": "INPUT_OUTPUT_OPTIONAL",
    "kDefaultMemory": "OrtMemTypeDefault",
}


def read_entries() -> list[str]:
    """Names of the Entry enum, without the k."""
    text = (ORT_SOURCES / "api.h").read_text()
    body = text.split("enum Entry : size_t {")[1].split("};")[0]
    return re.findall(r"k(\w+) = \d+,", body)


def read_members() -> list[str]:
    """Names of CustomOp's members, in order."""
    text = (ORT_SOURCES / "api.h").read_text()
    body = text.split("struct CustomOp {")[1].split("\n};")[0]
    found = re.findall(r"^  (?:uint32_t (\w+);|.*?\(\*(\w+)\))", body, re.MULTILINE)
    return [first or second for first, second in found]


def find_header() -> Path:
    """Folder of the installed header; skips or fails where there is none."""
    system = Path("/usr/include/onnxruntime")
    given = os.environ.get("ONNXRUNTIME_INCLUDE")
    folders = [Path(given)] if given else [system, system / "core" / "session"]
    found = [folder for folder in folders if (folder / HEADER).is_file()]
    if not found:
        reason = f"{HEADER} is not in {given or system}; ONNXRUNTIME_INCLUDE names its folder"
        skip_or_fail("ort-headers", reason)
    return found[0]


def make_source(entries: list[str]) -> str:
    checks = [
        f"static_assert(offsetof(OrtApi, {UNDERSCORED.get(name, name)}) / sizeof(void*) == "
        f'treeq::ort::k{name}, "{name}");'
        for name in entries
    ]
    for ours, theirs in MEMBERS.items():
        for operator in ("offsetof({}, {})", "sizeof({}::{})"):
            pair = (
                operator.format("OrtCustomOp", theirs),
                operator.format("treeq::ort::CustomOp", ours),
            )
            checks.append(f'static_assert({pair[0]} == {pair[1]}, "{theirs}");')
    checks += [
        f'static_assert(int({theirs}) == treeq::ort::{ours}, "{theirs}");'
        for ours, theirs in CONSTANTS.items()
    ]
    checks.append('static_assert(ORT_API_VERSION >= treeq::ort::kApiVersion, "version");')
    return "\n".join([f"#include <{HEADER}>", '#include "api.h"', *checks, ""])


def compile_source(source: str, header: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "check.cpp"
    path.write_text(source)
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{header}", f"-I{ORT_SOURCES}", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_entry_and_member_is_where_the_real_header_has_it(tmp_path: Path):
    done = compile_source(make_source(read_entries()), find_header(), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wrong_place_would_be_noticed(tmp_path: Path):
    """An entry that is somewhere else has to stop the compiler: else the test above is blind."""
    header = find_header()
    source = make_source(read_entries()).replace("kCreateStatus", "kGetErrorMessage")
    done = compile_source(source, header, tmp_path)
    assert done.returncode != 0
    assert "static assertion failed: CreateStatus" in done.stderr


def test_a_missing_header_fails_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE", str(tmp_path))
    monkeypatch.setenv("TREEQ_REQUIRE", "gpu")
    with pytest.raises(pytest.skip.Exception, match="ONNXRUNTIME_INCLUDE names its folder"):
        find_header()
    monkeypatch.setenv("TREEQ_REQUIRE", "gpu,ort-headers")
    with pytest.raises(pytest.fail.Exception, match=f"ort-headers: {HEADER} is not in"):
        find_header()


def test_nothing_of_the_table_escapes_the_checks():
    entries = read_entries()
    used = set()
    for path in ORT_SOURCES.glob("*.cpp"):
        used |= set(re.findall(r"g_api,\s*k(\w+)", path.read_text()))
    assert used
    assert used <= set(entries)
    assert len(entries) == len(set(entries))
    assert read_members() == list(MEMBERS)


def run_tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library(name: str) -> str:
    path = find_library(name)
    assert path is not None, f"{name} is not installed"
    return str(path)


@pytest.mark.parametrize(
    ("name", "own"), [(KERNELS_LIBRARY, set()), (ORT_LIBRARY, {"RegisterCustomOps"})]
)
def test_only_the_c_abi_is_exported(name: str, own: set[str]):
    lines = run_tool("nm", "-D", "--defined-only", library(name)).splitlines()
    symbols = [line.split()[-2:] for line in lines]
    # Weak and unique ones are templates of std:: that every library may hold.
    strong = {symbol for kind, symbol in symbols if kind not in {"W", "V", "u"}}
    weak = {symbol for kind, symbol in symbols if kind in {"W", "V", "u"}}
    assert {symbol for symbol in strong if not symbol.startswith("treeq_")} == own
    header = (ORT_SOURCES.parent / "include" / "treeq" / "qlinear.h").read_text()
    assert strong - own == set(re.findall(r"TREEQ_API [^;(]*?(treeq_\w+)\(", header))
    assert [symbol for symbol in weak if "treeq" in symbol] == []


@pytest.mark.parametrize("name", [KERNELS_LIBRARY, ORT_LIBRARY])
def test_no_cpp_runtime_is_needed(name: str):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run_tool("readelf", "-d", library(name)))
    assert needed, "readelf shows no library at all"
    allowed = ("libc.", "libm.", "ld-linux", "libgcc_s.")
    assert [other for other in needed if not other.startswith(allowed)] == []
