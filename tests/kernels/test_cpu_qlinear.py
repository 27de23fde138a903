"""The CPU kernels against quant/numerics.py, on every instruction set that this processor has."""

import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.hand_layers import make_format
from tests.kernels.cpu_monarch import CpuMonarch
from treeq_export.errors import RunnerError
from treeq_export.ops import ActScale, LayerFormat
from treeq_export.quant import numerics
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.packing import pack
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import ActivationFormat
from treeq_export.runners.cpu_kernels import CpuQLinear, load_kernels, read_isa

ISAS = ("avx512vnni", "avx2", "neon", "portable")
SCALES: tuple[ActScale, ...] = ("token_rms", "token_absmax", "tensor_static")


def available(isa: str) -> bool:
    """Whether the kernels of an instruction set run here."""
    command = [sys.executable, "-c", "from treeq_export.runners.cpu_kernels import *; read_isa()"]
    environment = {"TREEQ_ISA": isa, "PATH": "/usr/bin:/bin"}
    return (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )


AVAILABLE = [isa for isa in ISAS if available(isa)]


@dataclass
class Case:
    """A layer, its input, and what the reference makes of it."""

    codes: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    bits: int
    activation: ActivationFormat
    step: float | None
    rotation_group: int
    bias: NDArray[np.float32] | None
    branch: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    x: NDArray[np.float32]

    @property
    def format(self) -> LayerFormat:
        (n, k), groups = self.codes.shape, self.weight_scale.shape[1]
        return make_format(
            weight_bits=self.bits,
            act_bits=self.activation.bits or 0,
            act_scale=self.activation.scale,
            act_step=self.step or 0.0,
            rotation_group=self.rotation_group,
            group_size=0 if groups == 1 else k // groups,
            in_features=k,
            out_features=n,
        )

    def open(self) -> CpuQLinear:
        return CpuQLinear(
            self.format,
            pack(self.codes, self.bits),
            self.weight_scale,
            bias=self.bias,
            branch=self.branch,
        )

    def expected(self) -> NDArray[np.float64]:
        """Return y in float64, from float32 codes of x, so that no code flips."""
        rotated = rotate(self.x, self.rotation_group)
        scale = self.weight_scale.astype(np.float64)
        if self.activation.bits is None or self.step is None:
            weight = numerics.dequantize_weight(self.codes, scale)
            y = rotated.astype(np.float64) @ weight.T
        else:
            with self.open() as layer:
                q_x, s_x, _ = layer.inspect(self.x)
            sums = numerics.accumulate(q_x, self.codes, scale.shape[1])
            y = numerics.dequantize_output(sums, scale, s_x.astype(np.float64))
        if self.bias is not None:
            y = y + self.bias
        return y if self.branch is None else y + monarch(self.x, *self.branch)


def monarch(
    x: NDArray[np.float32], r: NDArray[np.float32], l_: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return M x by the definition of design.md, in float64."""
    b_in, block, _ = r.shape
    b_out = len(l_)
    z = np.einsum("mik,ikj->mij", x.reshape(len(x), b_in, block).astype(np.float64), r)
    grid = z.reshape(len(x), b_in, b_out, -1).transpose(0, 2, 1, 3).reshape(len(x), b_out, -1)
    return np.einsum("moq,oqn->mon", grid, l_.astype(np.float64)).reshape(len(x), -1)


def make_case(
    m: int,
    k: int,
    n: int,
    *,
    bits: int = 3,
    act_bits: int | None = 3,
    scale: ActScale = "token_rms",
    groups: int = 1,
    rotation_group: int = 1,
    has_bias: bool = True,
    branch: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Case:
    """Return a random case; branch is (b_in, b_out, r)."""
    rng = np.random.default_rng(seed)
    qmin, qmax = INTEGER.ends(bits)
    activation = ActivationFormat(bits=act_bits, scale=scale if act_bits else "none")
    step = numerics.activation_step(activation) or (0.1 if act_bits else None)
    factors = None
    if branch is not None:
        b_in, b_out, rank = branch
        factors = (
            rng.standard_normal((b_in, k // b_in, b_out * rank)).astype(np.float32) / 8,
            rng.standard_normal((b_out, b_in * rank, n // b_out)).astype(np.float32) / 8,
        )
    return Case(
        codes=rng.integers(qmin, qmax + 1, (n, k)).astype(np.int8),
        weight_scale=(0.1 + rng.random((n, groups))).astype(np.float32) / k,
        bits=bits,
        activation=activation,
        step=step,
        rotation_group=rotation_group,
        bias=rng.standard_normal(n).astype(np.float32) if has_bias else None,
        branch=factors,
        x=rng.standard_normal((m, k)).astype(np.float32),
    )


def check_case(case: Case) -> NDArray[np.float32]:
    """Check codes, scales, sums and output; return the output."""
    with case.open() as layer:
        y = layer.run(case.x)
        if case.activation.bits is not None and case.step is not None:
            q_x, s_x, sums = layer.inspect(case.x)
            rotated = rotate(case.x, case.rotation_group)
            scale = numerics.activation_scale(rotated, case.activation.scale, case.step)
            np.testing.assert_allclose(s_x, scale, rtol=2e-6)
            codes = numerics.quantize_activation(rotated, scale, case.activation.bits)
            # A code may flip by one where another order of summation crosses a rounding border.
            assert np.abs(q_x.astype(int) - codes).max(initial=0) <= 1
            assert np.count_nonzero(q_x != codes) <= 1 + case.x.size // 1000
            groups = case.weight_scale.shape[1]
            np.testing.assert_array_equal(sums, numerics.accumulate(q_x, case.codes, groups))
    expected = case.expected()
    k, groups = case.codes.shape[1], case.weight_scale.shape[1]
    largest = np.abs(expected).max(initial=1e-30)
    exact = case.activation.bits is not None and case.branch is None
    tolerance = (4 + groups if exact else 4 + math.sqrt(k)) * np.finfo(np.float32).eps
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * largest)
    return y


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rotation_group = 2 ** draw(st.integers(0, 9))
    factor = draw(st.integers(1, 5 if rotation_group > 64 else 40))
    k = rotation_group * factor
    divisors = [d for d in range(1, k + 1) if k % d == 0 and d <= 16]
    n = draw(st.integers(1, 150))
    act_bits = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8, None]))
    branch = None
    if draw(st.booleans()):
        b_in = draw(st.sampled_from([d for d in divisors if d <= 8]))
        b_out = draw(st.sampled_from([d for d in range(1, 9) if n % d == 0]))
        branch = (b_in, b_out, draw(st.integers(1, 6)))
    return make_case(
        draw(st.integers(1, 40)),
        k,
        n,
        bits=draw(st.integers(2, 8)),
        act_bits=act_bits,
        scale=draw(st.sampled_from(SCALES)),
        groups=draw(st.sampled_from(divisors)),
        rotation_group=rotation_group,
        has_bias=draw(st.booleans()),
        branch=branch,
        seed=draw(st.integers(0, 1000)),
    )


@given(case=cases())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_shape_on_every_instruction_set(case: Case, monkeypatch: pytest.MonkeyPatch):
    outputs = []
    for isa in AVAILABLE:
        monkeypatch.setenv("TREEQ_ISA", isa)
        assert read_isa() == isa
        outputs.append(check_case(case))
    for isa, y in zip(AVAILABLE, outputs, strict=True):
        np.testing.assert_array_equal(y.view(np.int32), outputs[-1].view(np.int32), err_msg=isa)


def test_this_machine_has_more_than_the_reference():
    assert AVAILABLE[-1] == "portable"
    assert len(AVAILABLE) > 1, "no vector instruction set: the kernels were not tested"


# M around the panels of 12 tokens, K and N of DiT-XL/2 and odd ones.
SHAPES = [
    (m, k, n)
    for k, n in [(1152, 3456), (4608, 1152), (1152, 100)]
    for m in (1, 2, 4, 5, 12, 13, 16, 23, 64)
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sums_of_real_layers_are_equal_bit_for_bit(bits: int, monkeypatch: pytest.MonkeyPatch):
    for m, k, n in SHAPES[:: 1 if bits == 3 else 5]:
        case = make_case(m, k, n, bits=bits, act_bits=bits, rotation_group=128, seed=m)
        results = []
        for isa in AVAILABLE[:-1]:
            monkeypatch.setenv("TREEQ_ISA", isa)
            with case.open() as layer:
                results.append((layer.run(case.x), *layer.inspect(case.x)))
        expected = numerics.accumulate(results[0][1], case.codes)
        for y, codes, scales, sums in results:
            np.testing.assert_array_equal(sums, expected)
            np.testing.assert_array_equal(codes, results[0][1])
            np.testing.assert_array_equal(scales, results[0][2])
            np.testing.assert_array_equal(y, results[0][0])


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("scale", ["token_rms", "token_absmax"])
def test_nan_and_infinity_spoil_their_own_token_only(
    isa: str, scale: ActScale, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(9, 96, 40, scale=scale, rotation_group=32)
    clean = case.x.copy()
    case.x[2, 5] = np.nan
    case.x[4, 0] = np.inf
    case.x[5, 95] = -np.inf
    with case.open() as layer:
        y, untouched = layer.run(case.x), layer.run(clean)
    spoilt = [2, 4, 5]
    assert np.isnan(y[spoilt]).all()
    others = [row for row in range(9) if row not in spoilt]
    np.testing.assert_array_equal(y[others], untouched[others])


@pytest.mark.parametrize("isa", AVAILABLE)
def test_nan_under_a_static_scale_has_the_code_zero(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(3, 40, 8, scale="tensor_static", act_bits=8)
    case.x[1, 7] = np.nan
    case.x[1, 8], case.x[1, 9] = np.inf, -np.inf
    with case.open() as layer:
        codes, _, sums = layer.inspect(case.x)
    assert codes[1, 7:10].tolist() == [0, 127, -128]
    np.testing.assert_array_equal(sums, numerics.accumulate(codes, case.codes))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_rounding_is_half_to_even(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(1, 16, 4, scale="tensor_static", act_bits=4)
    case.step = 1.0
    case.x[0] = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        6.5,
        7.5,
        -8.5,
        99,
        -99,
        0.49999997,
        1,
        -1,
        0,
        3.5,
    ]
    with case.open() as layer:
        codes, _, _ = layer.inspect(case.x)
    assert codes[0].tolist() == [0, 2, 2, 0, -2, -2, 6, 7, -8, 7, -8, 0, 1, -1, 0, 4]


@pytest.mark.parametrize("isa", AVAILABLE)
def test_a_token_of_zeros_gives_the_bias(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(3, 64, 10)
    case.x[1] = 0
    with case.open() as layer:
        y = layer.run(case.x)
    np.testing.assert_array_equal(y[1], case.bias)


def test_no_tokens_are_fine():
    with make_case(0, 64, 10).open() as layer:
        assert layer.run(np.empty((0, 64), np.float32)).shape == (0, 10)


def test_rows_do_not_depend_on_the_batch():
    case = make_case(64, 160, 70, rotation_group=32, branch=(2, 2, 3))
    with case.open() as layer:
        whole = layer.run(case.x)
        for m in (1, 2, 3, 4, 5, 11, 12, 13, 25, 63):
            np.testing.assert_array_equal(layer.run(case.x[:m]), whole[:m])


def test_largest_products_do_not_saturate(monkeypatch: pytest.MonkeyPatch):
    """AVX2 multiplies pairs into 16 bits: the extremes of every pair of widths."""
    for bits in range(2, 9):
        for act_bits in range(2, 9):
            case = make_case(2, 64, 33, bits=bits, act_bits=act_bits, scale="tensor_static")
            low, high = INTEGER.ends(bits)
            case.codes[:] = high
            case.codes[::2] = low
            case.x[0], case.x[1] = 1e6, -1e6
            for isa in AVAILABLE:
                monkeypatch.setenv("TREEQ_ISA", isa)
                with case.open() as layer:
                    codes, _, sums = layer.inspect(case.x)
                assert {codes[0, 0], codes[1, 0]} == set(INTEGER.ends(act_bits))
                np.testing.assert_array_equal(sums, numerics.accumulate(codes, case.codes))


def test_threads_of_the_caller_give_the_same_bits():
    case = make_case(70, 288, 200, rotation_group=32, branch=(1, 1, 8))
    with case.open() as layer, ThreadPoolExecutor(4) as pool:
        expected = layer.run(case.x)
        for _ in range(3):
            np.testing.assert_array_equal(layer.run(case.x, pool=pool), expected)
        # The same layer by several callers at once.
        for y in pool.map(lambda _: layer.run(case.x), range(8)):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(("b_in", "b_out", "rank"), [(1, 1, 8), (4, 2, 3), (3, 5, 1), (1, 25, 17)])
def test_monarch_alone(isa: str, b_in: int, b_out: int, rank: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(19, 96 if b_in != 5 else 95, 150, branch=(b_in, b_out, rank))
    assert case.branch is not None
    expected = monarch(case.x, *case.branch)
    with CpuMonarch(*case.branch) as branch:
        y = branch.run(case.x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_a_packed_layer_holds_its_bits_and_little_more():
    case = make_case(1, 1152, 1152, bits=3, has_bias=True)
    with case.open() as layer:
        planes = 1152 * 1152 * 3 // 8
        assert planes <= layer.num_bytes <= planes + 2 * 1152 * 4


def change(**fields: Any) -> Callable[[CpuQLinear], None]:
    def apply(layer: CpuQLinear) -> None:
        for name, value in fields.items():
            setattr(layer._config, name, value)

    return apply


BAD = {
    "abi_version": (change(abi_version=1), "built for another version"),
    "weight_bits-1": (change(weight_bits=1), "weight_bits is not in 2..8"),
    "weight_bits-9": (change(weight_bits=9), "weight_bits is not in 2..8"),
    "act_bits-1": (change(act_bits=1), "act_bits is not in 2..8"),
    "act_bits-0": (change(act_bits=0), "act_bits is not in 2..8"),
    "act_bits-none": (change(act_scale=0), "not 0 where act_scale is none"),
    "act_scale": (change(act_scale=7), "act_scale is unknown"),
    "act_step-0": (change(act_step=0.0), "act_step is not a positive number"),
    "act_step-nan": (change(act_step=math.nan), "act_step is not a positive number"),
    "rotation-3": (change(rotation_group=3), "no power of two that divides in_features"),
    "rotation-128": (change(rotation_group=128), "no power of two that divides in_features"),
    "rotation-0": (change(rotation_group=0), "no power of two that divides in_features"),
    "group": (change(group_size=7), "group_size does not divide in_features"),
    "in_features": (change(in_features=0), "a size is not positive or too large"),
    "out_features": (change(out_features=1 << 40), "a size is not positive or too large"),
    "branch": (change(branch_rank=1, branch_in=5, branch_out=1), "block grid does not divide"),
    "branch-null": (change(branch_rank=1, branch_in=1, branch_out=1), "array is missing"),
    "overflow": (
        change(in_features=1 << 20, weight_bits=8, act_bits=8),
        "an int32 sum could overflow",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configurations_are_one_clear_line(what: str):
    apply, message = BAD[what]
    layer = make_case(1, 96, 8, rotation_group=32).open()
    apply(layer)
    with pytest.raises(RunnerError, match=message) as caught:
        layer.__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("isa", ["avx9", "sve"])
def test_unknown_instruction_sets_are_refused(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    with pytest.raises(RunnerError, match="TREEQ_ISA names an instruction set that is unknown"):
        read_isa()
    with pytest.raises(RunnerError, match="use avx512vnni, avx2, neon or portable"):
        make_case(1, 64, 8).open().__enter__()


def test_inputs_of_a_wrong_shape_are_refused():
    with make_case(1, 64, 8).open() as layer:
        for x in (np.zeros((2, 63), np.float32), np.zeros((2, 64)), np.zeros(64, np.float32)):
            with pytest.raises(RunnerError, match=r"expected float32 \(m, 64\)"):
                layer.run(x)


def test_planes_of_another_layer_are_refused():
    case = make_case(1, 64, 8)
    with pytest.raises(RunnerError, match=r"planes are \(3, 8, 2\), expected \(3, 8, 3\)"):
        CpuQLinear(replace(case.format, in_features=96), pack(case.codes, 3), case.weight_scale)


def test_workspaces_are_given_back():
    with make_case(50, 64, 80).open() as layer:
        x = make_case(50, 64, 80).x
        expected = layer.run(x)
        load_kernels().treeq_release_workspaces()
        np.testing.assert_array_equal(layer.run(x), expected)
