"""Sums of the largest codes of every width: none may be cut off on the way, in 16 bits or in 32."""

import numpy as np
import pytest

from tests.kernels.test_cpu_qlinear import AVAILABLE, Case
from treeq_export.quant.grids import INTEGER
from treeq_export.quant.spec import ActivationFormat

# A pair of products is added up in 16 bits so often as fits; this is a little more than twice that.
INT16 = 32767


def extreme_case(bits: int, act_bits: int, m: int, *, sign: int) -> Case:
    """Return a layer whose weight codes all are the largest, for inputs beyond the clip."""
    steps = INT16 // (2 * (2**bits - 1) * 2 ** (act_bits - 1))
    k = 8 * (steps + 1) + 5
    codes = np.full((33, k), INTEGER.ends(bits)[1], np.int8)
    codes[1] = INTEGER.ends(bits)[0]
    return Case(
        codes=codes,
        weight_scale=np.ones((33, 1), np.float32),
        bits=bits,
        activation=ActivationFormat(bits=act_bits, scale="tensor_static"),
        step=1.0,
        rotation_group=1,
        bias=None,
        branch=None,
        x=np.full((m, k), sign * 1000, np.float32),
    )


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("act_bits", range(2, 9))
def test_no_sum_is_cut_off(isa: str, act_bits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TREEQ_ISA", isa)
    low, high = INTEGER.ends(act_bits)
    for bits in range(2, 9):
        for m, sign in ((1, -1), (2, -1), (13, -1), (7, 1)):
            case = extreme_case(bits, act_bits, m, sign=sign)
            with case.open() as layer:
                q_x, _, sums = layer.inspect(case.x)
            assert np.all(q_x == (low if sign < 0 else high))
            expected = case.codes.astype(np.int64).sum(1) * (low if sign < 0 else high)
            np.testing.assert_array_equal(sums.reshape(m, 33), np.tile(expected, (m, 1)))
