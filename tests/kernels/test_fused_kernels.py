"""The fused call of the CPU kernels against float64 and against its own parts.

`normalise` repeats the kernel's order of sums in numpy, so LayerNorm with modulation, gate and
residual are compared bit for bit; GELU and the whole with float64, with the error that plain numpy
float32 has as the measure.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit

from tests.kernels.test_cpu_qlinear import AVAILABLE, SCALES, Case, make_case
from treeq_export.errors import RunnerError
from treeq_export.quant import numerics
from treeq_export.quant.rotation import rotate
from treeq_export.runners.cpu_kernels import CpuQLinear

EPS = float(np.finfo(np.float32).eps)
LANES = 16
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass
class Fusion:
    """What is fused to a case; every array may be None."""

    images: int = 1
    norm: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    activation: str = "none"
    gate: NDArray[np.float32] | None = None
    residual: NDArray[np.float32] | None = None
    num_outputs: int = 1
    epsilon: float = 1e-6

    def run(self, layer: CpuQLinear, x: NDArray[np.float32], **more: Any) -> NDArray[np.float32]:
        """Return the outputs side by side, (M, N)."""
        outputs = layer.run_fused(
            x,
            norm_scale=self.norm and self.norm[0],
            norm_shift=self.norm and self.norm[1],
            norm_epsilon=self.epsilon,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            tokens=len(x) // self.images,
            num_outputs=self.num_outputs,
            **more,
        )
        assert [y.shape[1] for y in outputs] == [layer.out_features // self.num_outputs] * len(
            outputs
        )
        return np.concatenate(outputs, axis=1)


def make_fusion(
    case: Case,
    *,
    images: int = 1,
    norm: bool = False,
    activation: str = "none",
    gate: bool = False,
    num_outputs: int = 1,
    seed: int = 1,
) -> Fusion:
    """Return random arrays of a fusion for a case."""
    rng = np.random.default_rng(seed)
    n, k = case.codes.shape

    def draw(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    return Fusion(
        images=images,
        norm=(draw(images, k) / 2, draw(images, k)) if norm else None,
        activation=activation,
        gate=draw(images, n) if gate else None,
        residual=draw(len(case.x), n) if gate else None,
        num_outputs=num_outputs,
    )


def sum_in_lanes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum the last axis as generic.inl does: 16 lanes, then a tree. (M, K) -> (M, 1)."""
    lanes = np.zeros((len(x), LANES), np.float32)
    for i in range(0, x.shape[1], LANES):
        part = x[:, i : i + LANES]
        lanes[:, : part.shape[1]] += part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def normalise(x: NDArray[np.float32], fusion: Fusion) -> NDArray[np.float32]:
    """Return LayerNorm(x) (1 + scale) + shift, every rounding as in generic.inl."""
    if fusion.norm is None:
        return x
    one, k = np.float32(1), np.float32(x.shape[1])
    scale, shift = (np.repeat(a, len(x) // fusion.images, axis=0) for a in fusion.norm)
    centred = x - sum_in_lanes(x) / k
    variance = sum_in_lanes(centred * centred) / k
    inverse = one / np.sqrt(variance + np.float32(fusion.epsilon))
    return centred * inverse * (scale + one) + shift


def gelu_tanh(x: NDArray[Any]) -> NDArray[Any]:
    """Return GELU in its tanh form as it is usually written, in the dtype of x."""
    kind = x.dtype.type
    u = kind(np.sqrt(2 / np.pi)) * (x + kind(0.044715) * x**3)
    return kind(0.5) * x * (kind(1) + np.tanh(u))


def monarch(x: NDArray[Any], r: NDArray[Any], l_: NDArray[Any]) -> NDArray[Any]:
    """Return M x by the definition of design.md, in the dtype of x."""
    r, l_ = r.astype(x.dtype), l_.astype(x.dtype)
    z = np.einsum("mik,ikj->mij", x.reshape(len(x), len(r), -1), r)
    grid = z.reshape(len(x), len(r), len(l_), -1).transpose(0, 2, 1, 3)
    return np.einsum("moq,oqn->mon", grid.reshape(len(x), len(l_), -1), l_).reshape(len(x), -1)


def reference(case: Case, fusion: Fusion, dtype: Any) -> NDArray[Any]:
    """Return the whole formula in plain numpy of a dtype; codes of x are the kernel's own."""
    x = case.x.astype(dtype)
    per_token = [
        None if a is None else np.repeat(a, len(x) // fusion.images, axis=0).astype(dtype)
        for a in (*(fusion.norm or (None, None)), fusion.gate)
    ]
    scale, shift, gate = per_token
    if scale is not None and shift is not None:
        deviation = x - x.mean(axis=1, keepdims=True)
        variance = (deviation**2).mean(axis=1, keepdims=True)
        x = deviation / np.sqrt(variance + dtype(fusion.epsilon)) * (1 + scale) + shift
    weight_scale = case.weight_scale.astype(dtype)
    if case.activation.bits is None:
        y = rotate(x, case.rotation_group) @ numerics.dequantize_weight(case.codes, weight_scale).T
    else:
        with case.open() as layer:
            codes, s_x, _ = layer.inspect(normalise(case.x, fusion))
        sums = numerics.accumulate(codes, case.codes, weight_scale.shape[1])
        y = numerics.dequantize_output(sums, weight_scale, s_x.astype(dtype))
    if case.bias is not None:
        y = y + case.bias.astype(dtype)
    if case.branch is not None:
        y = y + monarch(x, *case.branch)
    if fusion.activation == "gelu_tanh":
        y = gelu_tanh(y)
    if gate is not None and fusion.residual is not None:
        y = fusion.residual.astype(dtype) + gate * y
    return y


def check_case(case: Case, fusion: Fusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instruction set has the bits of portable, and an error like that of numpy float32."""
    outputs = []
    for isa in AVAILABLE:
        monkeypatch.setenv("TREEQ_ISA", isa)
        with case.open() as layer:
            outputs.append(fusion.run(layer, case.x))
        np.testing.assert_array_equal(outputs[-1].view(np.int32), outputs[0].view(np.int32), isa)
    exact = reference(case, fusion, np.float64)
    plain = np.abs(reference(case, fusion, np.float32) - exact).max(initial=0)
    tolerance = 2 * plain + 2 * EPS * np.abs(exact).max(initial=0)
    np.testing.assert_allclose(outputs[-1], exact, rtol=0, atol=tolerance)


def same_bits(y: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(y.view(np.int32), expected.view(np.int32))


# Images, tokens of one (panels of 12 rows cross their borders), K and N.
SHAPES = [(1, 1, 64, 96), (3, 5, 37, 192), (2, 13, 75, 96)]
LAYERS: dict[str, dict[str, Any]] = {
    "3 bits": {"act_bits": 3},
    "weight-only": {"act_bits": None},
    "branch": {"act_bits": 8, "branch": (1, 2, 3)},
    "branch, weight-only": {"act_bits": None, "branch": (1, 3, 2), "has_bias": False},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "norm": {"norm": True},
    "gate": {"gate": True},
    "2 outputs": {"num_outputs": 2},
    "norm, 3 outputs": {"norm": True, "num_outputs": 3},
    "norm, gate": {"norm": True, "gate": True},
}


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("what", FUSIONS)
def test_norm_gate_and_outputs_are_their_parts_bit_for_bit(
    isa: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_ISA", isa)
    for images, tokens, k, n in SHAPES:
        n = 192 if "outputs" in what else n - 5 * (n == 96)
        for options in LAYERS.values():
            if n % options.get("branch", (1, 1, 1))[1]:
                options = options | {"branch": (1, 1, 3)}
            case = make_case(images * tokens, k, n, **options)
            fusion = make_fusion(case, images=images, **FUSIONS[what])
            with case.open() as layer:
                y = fusion.run(layer, case.x)
                expected = layer.run(normalise(case.x, fusion))
            if fusion.gate is not None and fusion.residual is not None:
                expected = fusion.residual + np.repeat(fusion.gate, tokens, axis=0) * expected
            same_bits(y, expected)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_all_at_once_on_a_transformer_layer(
    options: dict[str, Any], num_outputs: int, monkeypatch: pytest.MonkeyPatch
):
    case = make_case(2 * 17, 288, 576, rotation_group=32, **options)
    is_single = num_outputs == 1
    fusion = make_fusion(
        case,
        images=2,
        norm=True,
        activation="gelu_tanh",
        gate=is_single,
        num_outputs=num_outputs,
    )
    check_case(case, fusion, monkeypatch)


@st.composite
def fused_cases(draw: st.DrawFn) -> tuple[Case, Fusion]:
    num_outputs = draw(st.integers(1, 3))
    several = num_outputs > 1
    n = draw(st.integers(1, 3)) * 32 * num_outputs if several else draw(st.integers(1, 110))
    rotation_group = 2 ** draw(st.integers(0, 6))
    k = rotation_group * draw(st.integers(1, 200 // rotation_group))
    images, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 15))
    branch = None
    if draw(st.booleans()):
        b_in = draw(st.sampled_from([d for d in range(1, 9) if k % d == 0]))
        b_out = draw(st.sampled_from([d for d in range(1, 9) if n % d == 0]))
        branch = (b_in, b_out, draw(st.integers(1, 4)))
    case = make_case(
        images * tokens,
        k,
        n,
        bits=draw(st.integers(2, 8)),
        act_bits=draw(st.sampled_from([3, 4, 8, None])),
        scale=draw(st.sampled_from(SCALES)),
        groups=draw(st.sampled_from([d for d in range(1, 9) if k % d == 0])),
        rotation_group=rotation_group,
        has_bias=draw(st.booleans()),
        branch=branch,
        seed=draw(st.integers(0, 1000)),
    )
    fusion = make_fusion(
        case,
        images=images,
        norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["none", "gelu_tanh"])),
        gate=not several and draw(st.booleans()),
        num_outputs=num_outputs,
    )
    return case, fusion


@given(drawn=fused_cases())
@FUZZ
def test_any_fusion_on_every_instruction_set(
    drawn: tuple[Case, Fusion], monkeypatch: pytest.MonkeyPatch
):
    check_case(*drawn, monkeypatch)


def make_mirror(rows: int) -> Case:
    """A layer that returns its 32 inputs exactly: the unit matrix, not quantized."""
    case = make_case(rows, 32, 32, act_bits=None, has_bias=False)
    case.codes[:] = np.eye(32)
    case.weight_scale[:] = 1
    return case


@pytest.mark.parametrize("isa", AVAILABLE)
def test_gelu_from_minus_30_to_30(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_mirror(2000)
    fine = 10.0 ** np.linspace(-30, 0, 32 * 400)
    values = np.concatenate([np.linspace(-30, 30, 32 * 1200), fine, -fine])
    case.x = values.reshape(2000, 32).astype(np.float32)
    with case.open() as layer:
        same_bits(layer.run(case.x), case.x)  # the mirror is one
        y = Fusion(activation="gelu_tanh").run(layer, case.x)
    x = case.x.astype(np.float64)
    exponent = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    expected = x * expit(exponent)
    # A relative error of the exponent is an absolute one of its exponential; e^88 is the largest.
    relative = 2 * EPS * (1 + np.minimum(np.abs(exponent), 90))
    assert (np.abs(y - expected) <= relative * np.abs(expected) + 3e-37).all()
    # At most twice as far off as the usual form in float32.
    assert np.abs(y - expected).max() <= 2 * np.abs(gelu_tanh(case.x) - expected).max()


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("act_bits", [3, None])
def test_nan_and_infinity_spoil_their_own_token_only(
    isa: str, act_bits: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(10, 75, 41, act_bits=act_bits, branch=(1, 1, 2))
    fusion = make_fusion(case, images=2, norm=True, activation="gelu_tanh", gate=True)
    clean = case.x.copy()
    case.x[2, 5], case.x[4, 0], case.x[7, 74] = np.nan, np.inf, -np.inf
    with case.open() as layer:
        y, untouched = fusion.run(layer, case.x), fusion.run(layer, clean)
    spoilt = np.isin(np.arange(10), [2, 4, 7])
    assert np.isnan(y[spoilt]).all()
    same_bits(y[~spoilt], untouched[~spoilt])


@pytest.mark.parametrize("isa", AVAILABLE)
def test_nan_and_infinity_pass_gelu_and_gate(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(3, 1, 1, act_bits=None, has_bias=False)
    case.codes[:], case.weight_scale[:] = 1, 1
    case.x[:, 0] = np.nan, np.inf, 2.0
    with case.open() as layer:
        y = Fusion(activation="gelu_tanh").run(layer, case.x)
        assert np.isnan(y[0, 0])
        assert y[1, 0] == np.inf
        fusion = make_fusion(case, images=3, gate=True)
        assert fusion.gate is not None
        assert fusion.residual is not None
        fusion.residual[2], fusion.gate[1] = np.inf, np.nan
        y = fusion.run(layer, case.x)
    assert np.isnan(y[:2]).all()
    assert y[2, 0] == np.inf


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("n", [96, 41])
def test_an_addend_is_added_last(isa: str, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    case = make_case(23, 64, n, branch=(1, 1, 4))
    addend = np.random.default_rng(2).standard_normal((23, n)).astype(np.float32)
    with case.open() as layer:
        [y] = layer.run_fused(case.x, addend=addend)
        same_bits(y, layer.run(case.x) + addend)


def test_threads_of_the_caller_give_the_same_bits():
    case = make_case(70, 288, 192, rotation_group=32, branch=(1, 1, 8))
    fusion = make_fusion(case, images=7, norm=True, activation="gelu_tanh", num_outputs=3)
    with case.open() as layer, ThreadPoolExecutor(4) as pool:
        expected = fusion.run(layer, case.x)
        same_bits(fusion.run(layer, case.x, pool=pool), expected)
        for y in pool.map(lambda _: fusion.run(layer, case.x), range(4)):
            same_bits(y, expected)


ROW, WIDE = np.zeros((1, 96), np.float32), np.zeros((6, 96), np.float32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "relu"}, "fused activation is unknown"),
    "outputs of 48": ({"num_outputs": 2}, "do not share the channels in tiles of 32"),
    "5 outputs": ({"num_outputs": 5}, "do not share the channels in tiles of 32"),
    "no output": ({"num_outputs": 0}, "do not share the channels in tiles of 32"),
    "gate, 3 outputs": (
        {"num_outputs": 3, "gate": ROW, "residual": WIDE},
        "do not share the channels",
    ),
    "tokens": ({"tokens": 4}, "tokens do not divide the rows"),
    "no tokens": ({"tokens": 0}, "tokens do not divide the rows"),
    "gate alone": ({"gate": ROW}, "a required array is missing"),
    "residual alone": ({"residual": WIDE}, "a required array is missing"),
    "addend, gate": (
        {"addend": WIDE, "gate": ROW, "residual": WIDE},
        "addend and gate are both given",
    ),
    "addend, 3 outputs": ({"num_outputs": 3, "addend": WIDE}, "do not share the channels"),
    "scale alone": ({"norm_scale": ROW}, "a required array is missing"),
    "shift alone": ({"norm_shift": ROW}, "a required array is missing"),
    "gate of another shape": (
        {"gate": ROW, "residual": WIDE, "tokens": 3},
        r"gate is float32 \(1, 96\), expected float32 \(2, 96\)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_fusions_are_one_clear_line(what: str):
    options, message = BAD[what]
    with (
        make_case(6, 96, 96).open() as layer,
        pytest.raises(RunnerError, match=f"^treeq_qlinear: .*{message}") as caught,
    ):
        layer.run_fused(WIDE, **options)
    assert "\n" not in str(caught.value)


def test_no_tokens_are_fine():
    with make_case(0, 64, 96).open() as layer:
        outputs = layer.run_fused(np.empty((0, 64), np.float32), num_outputs=3)
    assert [y.shape for y in outputs] == [(0, 32)] * 3
