"""Are the kernels' integers those of the CPU reference? Over all shapes, formats and tokens.

For each shape and format the codes of the largest M are made once; a smaller M is its first rows,
which have to come out the same, whatever kernel a smaller M chooses. Compared are

    codes            with quant/numerics.py on the same input; another order of summation may flip a
                     code that lies on a rounding border
    int32 sums       of the sums kernel, bit for bit
    the same sums    through the kernels that a layer launches (slices of K too), with all scales 1
                     and float32 out, bit for bit; float32 holds them exactly below 2^24
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gpu_cases import ROTATION_GROUP, Format, Layer, make_layer, make_tokens
from torch import Tensor
from treeq_gpu import launch

from treeq_export.quant import numerics
from treeq_export.quant.metrics import sqnr_db
from treeq_export.quant.rotation import rotate
from treeq_export.runners.gpu_layers import channel_order

_EXACT_FLOAT32 = 1 << 24
_CODE_TOKENS = 256  # of which codes are compared with numpy


def reference_sums(codes: Tensor, weight: np.ndarray) -> Tensor:
    """Return q_x q_w^T (M, N) int32 of codes (M, K) int8 on the CPU; float64 holds it exactly."""
    product = codes.double() @ torch.from_numpy(weight).double().T
    return product.to(torch.int32)


def reference_codes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the codes (M, K) of float32 tokens by quant/numerics.py."""
    rotated = rotate(x, ROTATION_GROUP)
    scale = numerics.activation_scale(rotated, fmt.act_scale, fmt.step)
    return numerics.quantize_activation(rotated, scale, fmt.act_bits)


def check_case(
    shape: str,
    fmt: Format,
    k: int,
    n: int,
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Return one row per number of tokens of one shape and format."""
    layer = make_layer(fmt, k, n, device, seed=1)
    x = make_tokens(max(tokens), k, device, dtype, seed=2)
    codes, _ = layer.quantize(x)
    in_order = channel_order(codes, k).cpu()
    compared = min(_CODE_TOKENS, len(x))
    expected_codes = reference_codes(x[:compared].float().cpu().numpy(), fmt)
    fraction = float((expected_codes == in_order[:compared].numpy()).mean())
    sums = reference_sums(in_order, layer.codes).to(device)
    largest = int(sums.abs().max())
    rows = []
    for m in tokens:
        own, scale = layer.quantize(x[:m].contiguous())
        row = {
            "shape": shape,
            "format": fmt.name,
            "m": m,
            "codes_repeat": bool(torch.equal(own, codes[:m])),
            "equal_code_fraction": fraction,
            "sums_equal": bool(torch.equal(integer_sums(layer, own), sums[:m])),
            "launched_sums_equal": None,
            "sqnr_db": float(_output_sqnr(layer, own, scale, sums[:m], dtype)),
        }
        if largest < _EXACT_FLOAT32:
            launched = layer.product_of_sums(own)
            row["launched_sums_equal"] = bool(torch.equal(launched, sums[:m].float()))
        rows.append(row)
    return rows


def integer_sums(layer: Layer, codes: Tensor) -> Tensor:
    """Return the int32 sums (M, N) of the sums kernel."""
    return launch.integer_sums(codes, layer.planes, layer.layer)


def _output_sqnr(
    layer: Layer, codes: Tensor, scale: Tensor, sums: Tensor, dtype: torch.dtype
) -> float:
    """Return the SQNR of y against float64 arithmetic on the same integers and scales."""
    rows = slice(0, 64)
    expected = sums[rows].double() * layer.weight_scale.double().T * scale[rows, None].double()
    expected += layer.bias.double()
    y = layer.product(codes, scale, dtype)[rows]
    return sqnr_db(expected.cpu().numpy(), y.double().cpu().numpy())


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows that are not as they have to be, in words."""
    bad = []
    for row in rows:
        wrong = [key for key in ("sums_equal", "codes_repeat") if not row[key]]
        if row["launched_sums_equal"] is False:
            wrong.append("launched_sums_equal")
        if row["equal_code_fraction"] < 0.999:
            wrong.append(f"equal_code_fraction {row['equal_code_fraction']:.5f}")
        if not row["sqnr_db"] >= 45:  # bf16 rounding alone costs about 50 dB
            wrong.append(f"sqnr {row['sqnr_db']:.1f} dB")
        if wrong:
            bad.append(f"{row['shape']} {row['format']} M={row['m']}: {', '.join(wrong)}")
    return bad
