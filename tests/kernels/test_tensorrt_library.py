"""How libtreeq_plugins.so is built, and how TensorRT-RTX finds it, without a GPU."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.plugin_build import (
    ROOT,
    SOURCES,
    Built,
    build_plugins,
    configure,
    header_roots,
    require_headers,
    run,
)
from tests.required import skip_or_fail
from treeq_export.ops import DOMAIN, PLUGIN_VERSION, PLUGINS

EMBED = ROOT / "kernels" / "tensorrt" / "embed.py"
FIELD_TYPES = {int: "INT32", float: "FLOAT32", str: "CHAR"}
CREATORS = {
    f"{DOMAIN}::{op.name}.{PLUGIN_VERSION}": [
        [name, FIELD_TYPES[kind]] for name, kind in op.attributes.items()
    ]
    for op in PLUGINS
}


def load_in_rtx(library: Path, *steps: str) -> dict[str, Any]:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        skip_or_fail("tensorrt-rtx", "the package tensorrt-rtx is not installed")
    script = SOURCES / "load_in_rtx.py"
    return json.loads(run(sys.executable, script, library, *steps).stdout)


def test_rtx_loads_the_library_and_builds_an_engine_with_it(built: Built):
    done = load_in_rtx(built.library, "import", "load", "build")
    assert done["errors"] == []
    assert done["is_loaded"]
    assert done["creators"] == [{}, CREATORS, CREATORS]
    assert done["plugins"] == ["branch", "linear"]
    # The planes are in the engine as they are: 3 bits a weight.
    assert done["engine_bytes"] > 1152 * 1536 * 3 // 8


def test_fields_of_the_parser_and_of_the_op_agree(built: Built):
    """TensorRT drops attributes that are not in the creator's list, silently."""
    fields = load_in_rtx(built.library, "import", "load")["creators"][-1]
    assert fields == CREATORS
    assert len(fields) == len(PLUGINS)


def test_a_plain_dlopen_registers_where_the_table_of_the_registry_is_known(built: Built):
    """TensorRT-RTX 1.7 has the table of TensorRT 11; built with 10's headers it is left alone."""
    is_known = built.major >= 11
    done = load_in_rtx(built.library, "import", "dlopen", *(["build"] if is_known else []))
    assert done["errors"] == []
    assert done["creators"][1] == (CREATORS if is_known else {})
    if is_known:
        assert done["plugins"] == ["branch", "linear"]


@pytest.mark.parametrize(
    "steps",
    [
        ("import", "dlopen", "load", "build"),
        ("dlopen", "import", "load", "build"),
        ("import", "load", "dlopen", "build"),
        ("import", "load", "drop", "load", "build"),
        ("import", "dlopen", "load", "drop", "load", "build"),
    ],
    ids=" ".join,
)
def test_no_order_of_opening_registers_twice(built: Built, steps: tuple[str, ...]):
    done = load_in_rtx(built.library, *steps)
    assert done["errors"] == []
    assert done["creators"][-1] == CREATORS
    assert done["plugins"] == ["branch", "linear"]
    if "drop" in steps:
        assert done["creators"][steps.index("drop") - steps.index("import")] == {}


def test_a_second_copy_leaves_the_first_registered(built: Built):
    shutil.copy(built.library, f"{built.library}.copy")
    done = load_in_rtx(built.library, "import", "load", "copy", "build")
    assert done["errors"] == []
    assert done["creators"][-1] == CREATORS
    assert done["plugins"] == ["branch", "linear"]


def test_without_headers_the_plugins_are_left_out_with_one_line(tmp_path: Path):
    said = [line for line in configure(tmp_path, "").splitlines() if "treeq: " in line]
    assert said == ["-- treeq: no TensorRT plugins: TENSORRT_ROOT is not set"]
    assert "treeq_plugins" not in run("cmake", "--build", tmp_path, "--target", "help").stdout


def test_a_wrong_root_is_left_out_with_one_line(tmp_path: Path):
    said = [line for line in configure(tmp_path, "/nowhere").splitlines() if "treeq: " in line]
    assert len(said) == 1
    assert (
        "no TensorRT plugins: NvInferRuntime.h in /nowhere: TREEQ_TENSORRT_INCLUDE-NOTF" in said[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("root", header_roots()[-1:])
def test_the_build_compiles_the_kernels_itself(root: str, tmp_path: Path):
    """One kernel, from the Triton language to the table in the library."""
    options = "-DTREEQ_AHEAD_OPTIONS=--only;monarch_in_token_fp16;--arch;sm_80"
    configure(tmp_path, require_headers(root), options)
    library = build_plugins(tmp_path)
    folder = tmp_path / "tensorrt" / "cubins"
    (kernel,) = json.loads((folder / "kernels.json").read_text())["kernels"]
    cubin = (folder / kernel["file"]).read_bytes()
    assert cubin[:4] == b"\x7fELF"
    assert cubin in library.read_bytes()
    assert b"x,R,z,M,block_in,b_in,b_out,rank,*,*," in library.read_bytes()


def test_a_missing_header_fails_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_REQUIRE", "gpu")
    with pytest.raises(pytest.skip.Exception, match=r"no NvInferRuntime\.h in TENSORRT_ROOT"):
        require_headers("")
    monkeypatch.setenv("TREEQ_REQUIRE", "gpu,tensorrt-headers")
    with pytest.raises(pytest.fail.Exception, match=r"no NvInferRuntime\.h in"):
        require_headers(str(tmp_path))


def make_manifest(folder: Path, data: bytes, digest: str) -> None:
    (folder / "one.sm_90.cubin").write_bytes(data)
    kernel = {
        "name": "one", "function": "one_kernel", "arch": "sm_90", "file": "one.sm_90.cubin",
        "sha256": digest, "shared_bytes": 7, "num_warps": 4,
        "params": [["x", "*fp16"], ["M", "i32"], ["scratch0", "*i8"]],
    }  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps({"kernels": [kernel]}))


def test_the_table_holds_what_the_manifest_says(tmp_path: Path):
    data = b"machine code"
    make_manifest(tmp_path, data, hashlib.sha256(data).hexdigest())
    run(sys.executable, EMBED, tmp_path, tmp_path / "table.S")
    text = (tmp_path / "table.S").read_text()
    assert '.asciz "x,M,*,"' in text
    assert ".4byte 90, 7, 4, 0" in text
    assert "treeq_num_kernels: .8byte 1" in text


def test_a_cubin_that_is_not_the_manifests_is_refused(tmp_path: Path):
    make_manifest(tmp_path, b"other code", "0" * 64)
    done = subprocess.run(
        [sys.executable, EMBED, str(tmp_path), str(tmp_path / "table.S")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "one.sm_90.cubin: sha256" in done.stderr
    assert f"expected {'0' * 64} as in kernels.json; run `python -m treeq_gpu.ahead" in done.stderr
    assert not (tmp_path / "table.S").exists()
