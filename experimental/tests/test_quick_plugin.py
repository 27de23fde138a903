"""Quick Deployable Plugins with a stand-in for `tensorrt.plugin`, and real kernels' PTX."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from treeq_gpu import ahead
from treeq_gpu.instantiations import DTYPES, qlinear, quantize
from triton import knobs

from experimental.quick_plugins.plugin import (
    PRODUCT_OP,
    QUANTIZE_OP,
    QuickPlugins,
    load_kernel,
    register_quick_plugins,
    require_quick_plugins,
)
from experimental.quick_plugins.ptx import float_bits, reorder_params
from treeq_export.errors import RunnerError
from treeq_export.ops import QLINEAR, ActScale
from treeq_export.runners.tensorrt_library import Runtime
from treeq_export.runners.tensorrt_plugin import KERNELS_VARIABLE

pytestmark = pytest.mark.slow

ARCHITECTURE = "sm_80"
QUANTIZE = quantize(ActScale.TOKEN_RMS, 64, "fp16")
PRODUCT = qlinear(3, "token", "fp16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two kernels, compiled ahead for sm_80."""
    folder = tmp_path_factory.mktemp("kernels")
    ahead.compile_all(folder, [ARCHITECTURE], [QUANTIZE.name, PRODUCT.name], jobs=1)
    return folder


def entry_params(ptx: str) -> list[str]:
    entry = ptx[ptx.index(".visible .entry") :]
    declared = entry[entry.index("(") + 1 : entry.index(")")].split(",")
    return [line.split("//")[0].split()[-1] for line in declared]


QUANTIZE_ORDER = "x M K KP qmin qmax step columns_per_program codes scale"
PRODUCT_ORDER = (
    "codes planes act_scale weight_scale bias addend M N KP KW num_groups has_bias has_addend y"
)


@pytest.mark.parametrize(
    ("made", "order"),
    [(QUANTIZE, QUANTIZE_ORDER), (PRODUCT, PRODUCT_ORDER)],
    ids=lambda value: getattr(value, "kernel", None),
)
def test_a_kernel_takes_inputs_integers_outputs(
    folder: Path, tmp_path: Path, made: Any, order: str
):
    names_in_order = order.split()
    kernel = load_kernel(folder, ARCHITECTURE, made)
    before = entry_params((folder / f"{made.name}.{ARCHITECTURE}.ptx").read_text())
    names = [name for name, _ in made.params]
    by_name = dict(zip(names, before, strict=False))
    assert sorted(names_in_order) == sorted(names)
    assert entry_params(kernel.ptx) == [by_name[name] for name in names_in_order]
    assert kernel.integers == tuple(name for name, kind in made.params if kind[0] != "*")
    assert kernel.num_threads == 32 * made.num_warps
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.ptx)
    assembled = subprocess.run(
        [knobs.nvidia.ptxas.path, f"-arch={ARCHITECTURE}", source, "-o", tmp_path / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert assembled.returncode == 0, assembled.stderr
    assert kernel.function.encode() in (tmp_path / "kernel.cubin").read_bytes()


PTX = """.visible .entry f(
\t.param .u64 .ptr f_param_0,
\t.param .u32 f_param_1,
\t.param .u64 .ptr f_param_2
)
{
\tld.param.u64 %rd1, [f_param_0];
\tld.param.u32 %r1, [f_param_1];
}
"""


def test_parameters_change_places_and_scratch_is_dropped():
    done = reorder_params(PTX, ["a", "n"], ["n", "a"])
    assert entry_params(done) == ["f_param_1", "f_param_0"]
    assert done.endswith(PTX[PTX.index("{") :])


def test_a_kernel_that_reads_scratch_is_refused():
    used = PTX.replace("}", "\tld.param.u64 %rd2, [f_param_2];\n}")
    with pytest.raises(RunnerError, match="reads scratch memory"):
        reorder_params(used, ["a", "n"], ["n", "a"])


@pytest.mark.parametrize(
    ("ptx", "names", "order"),
    [(PTX, ["a", "b", "c", "d"], ["a", "b", "c", "d"]), (PTX, ["a"], ["b"]), ("", ["a"], ["a"])],
)
def test_names_that_do_not_fit_are_refused(ptx: str, names: list[str], order: list[str]):
    with pytest.raises(RunnerError, match=r"PTX with \d parameters: expected a"):
        reorder_params(ptx, names, order)


class Desc:
    """Stands in for TensorDesc; symbolic sizes are integers."""

    def __init__(self, dtype: Any, *shape: int) -> None:
        self.dtype, self.shape_expr = dtype, shape

    def like(self) -> "Desc":
        return Desc(self.dtype, *self.shape_expr)


@dataclass
class StandIn:
    """Stands in for `tensorrt.plugin`; keeps what was registered."""

    found: dict[tuple[str, str], Any] = field(default_factory=dict)
    TensorDesc = Desc
    KernelLaunchParams = SimpleNamespace
    SymInt32 = int
    SymIntExprs = SimpleNamespace(from_tuple=tuple)
    ShapeExprs = SimpleNamespace(from_tuple=tuple)

    def __getattr__(self, kind: str) -> Any:
        return lambda name: lambda function: self.found.setdefault((kind, name), function)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def AutoTuneCombination(*args: Any) -> tuple[Any, ...]:  # noqa: N802
        return args


HALF, INT32, FLOAT = (SimpleNamespace(name=name) for name in ("HALF", "INT32", "FLOAT"))
X = Desc(HALF, 2, 5, 192)
PLANES, SCALE = Desc(INT32, 3, 96, 6), Desc(FLOAT, 96, 1)
CODES, ACT_SCALE = Desc(INT32, 2, 5, 64), Desc(FLOAT, 2, 5)
QUANTIZE_VALUES = (4, "token_rms", 0.34, 64, 192)
PRODUCT_VALUES = (3, 0, 192, 96, 1, 0)


@pytest.fixture
def registered(folder: Path) -> dict[tuple[str, str], Any]:
    stand_in = StandIn()
    trt = SimpleNamespace(int32=INT32, float32=FLOAT)
    QuickPlugins(trt, stand_in, folder, ARCHITECTURE).register()
    return stand_in.found


def test_both_plugins_have_all_three_functions(registered: dict[tuple[str, str], Any]):
    kinds = ("register", "aot_impl", "autotune")
    assert list(registered) == [(k, op.name) for op in (QUANTIZE_OP, PRODUCT_OP) for k in kinds]


def test_the_signatures_are_those_that_tensorrt_checks(registered: dict[tuple[str, str], Any]):
    import inspect
    from typing import get_args

    for op in (QUANTIZE_OP, PRODUCT_OP):
        own = [*op.tensors, *op.attributes]
        described = inspect.signature(registered["register", op.name])
        assert list(described.parameters) == own
        kinds = [parameter.annotation for parameter in described.parameters.values()]
        assert kinds == [Desc] * len(op.tensors) + list(op.attributes.values())
        assert get_args(described.return_annotation) == (Desc,) * op.num_outputs
        launched = inspect.signature(registered["aot_impl", op.name])
        assert list(launched.parameters) == [*own, "outputs", "tactic"]
        tuned = inspect.signature(registered["autotune", op.name])
        assert list(tuned.parameters) == [*own, "outputs"]


def test_attributes_are_the_ops_own():
    for op in (QUANTIZE_OP, PRODUCT_OP):
        for name, kind in op.attributes.items():
            if not name.startswith("has_"):
                assert kind is QLINEAR.attributes[name]
    used = {*QUANTIZE_OP.attributes, *PRODUCT_OP.attributes}
    assert used >= set(QLINEAR.attributes)


def test_quantize(registered: dict[tuple[str, str], Any]):
    codes, scale = registered["register", QUANTIZE_OP.name](X, *QUANTIZE_VALUES)
    assert (codes.dtype, codes.shape_expr) == (INT32, (2, 5, 64))  # 192 padded to 256, in words
    assert (scale.dtype, scale.shape_expr) == (FLOAT, (2, 5))
    function, ptx, launch, integers = registered["aot_impl", QUANTIZE_OP.name](
        X, *QUANTIZE_VALUES, (codes, scale), 0
    )
    assert f".entry {function}(" in ptx
    assert integers == (10, 192, 256, -8, 7, float_bits(0.34), 256)
    assert (launch.grid_x, launch.block_x) == (1, 32 * QUANTIZE.num_warps)


def test_product(registered: dict[tuple[str, str], Any]):
    inputs = (CODES, PLANES, ACT_SCALE, SCALE, SCALE, X)
    (y,) = registered["register", PRODUCT_OP.name](*inputs, *PRODUCT_VALUES)
    assert (y.dtype, y.shape_expr) == (HALF, (2, 5, 96))
    _, _, launch, integers = registered["aot_impl", PRODUCT_OP.name](
        *inputs, *PRODUCT_VALUES, (y,), 1
    )
    assert integers == (10, 96, 256, 6, 1, 1, 0)
    tile = PRODUCT.constants
    assert launch.grid_x == -(-10 // tile["BM"]) * -(-96 // tile["BN"])
    with pytest.raises(RunnerError, match="no kernel qlinear_w3_wide_fp16 for sm_80"):
        registered["aot_impl", PRODUCT_OP.name](*inputs, *PRODUCT_VALUES, (y,), 3)


def test_types_and_tactics(registered: dict[tuple[str, str], Any]):
    for op, num_io, num_tactics in ((QUANTIZE_OP, 3, 0), (PRODUCT_OP, 7, 3)):
        arguments = [X] * len(op.tensors) + [0] * len(op.attributes)
        ((types, layout, *tactics),) = registered["autotune", op.name](*arguments, ())
        columns = [part.strip().split("|") for part in types.split(",")]
        assert len(columns) == num_io
        assert {len(column) for column in columns} == {len(DTYPES)}
        assert layout == "LINEAR"
        assert len(tactics[0] if tactics else []) == num_tactics


@pytest.mark.parametrize("version", ["10.7.0.23", "9.3"])
def test_an_old_tensorrt_is_refused(version: str):
    with pytest.raises(RunnerError, match=rf"received tensorrt {version}, expected .* >= 10\.8"):
        require_quick_plugins(Runtime("tensorrt", None, version))
    require_quick_plugins(Runtime("tensorrt", None, "10.8.0.43"))
    require_quick_plugins(Runtime("tensorrt", None, "11.0.0"))


def test_rtx_has_no_quick_plugins():
    with pytest.raises(RunnerError, match="received tensorrt-rtx 1"):
        require_quick_plugins(Runtime("tensorrt-rtx", None, "1.7"))


def test_kernels_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runtime = Runtime("tensorrt", None, "10.8.0")
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    with pytest.raises(RunnerError, match=r"no GPU kernels.*treeq_gpu\.ahead"):
        register_quick_plugins(runtime, "sm_80")
    monkeypatch.setenv(KERNELS_VARIABLE, str(tmp_path))
    with pytest.raises(RunnerError, match=r"kernels\.json: cannot be read"):
        register_quick_plugins(runtime, "sm_80")
    entry = {"name": "k", "arch": "sm_90", "file": "k.cubin", "sha256": "0", "function": "k"}
    entry |= {"shared_bytes": 0, "num_warps": 4, "params": []}
    (tmp_path / "kernels.json").write_text(json.dumps({"kernels": [entry]}))
    with pytest.raises(RunnerError, match="kernels for sm_90, but the GPU is sm_80"):
        register_quick_plugins(runtime, "sm_80")


def test_a_float_travels_as_its_bits():
    assert (hex(float_bits(1.0)), float_bits(-0.0)) == ("0x3f800000", -2147483648)
