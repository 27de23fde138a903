"""Fitting one layer: branch, weight scales, codes and activation step from its weight and inputs.

1. The branch M is the truncated SVD of each block of W; then the residual W' = (W - M) H_g gets
   the scales of least squared error over a clipping grid.
2. The codes are rounded to nearest, or so that the layer's output error is least (quant/gptq.py).
"""

import numpy as np
from numpy.typing import NDArray

from treeq_export.model.statistics import InputStatistics
from treeq_export.plan import LayerPlan, Tensors
from treeq_export.quant.branch import dense_branch, fit_branch
from treeq_export.quant.gptq import quantize_weight_gptq, second_moment
from treeq_export.quant.numerics import activation_step, quantize_weight
from treeq_export.quant.rotation import rotate
from treeq_export.quant.scales import fit_tensor_scale, fit_weight_scale
from treeq_export.recipe import CalibrateSection


def quantize_layer(
    layer: LayerPlan,
    weight: NDArray[np.floating],
    statistics: InputStatistics,
    section: CalibrateSection,
) -> Tensors:
    """Return one layer's tensors by short name.

    Args:
        layer: Its entry in the plan.
        weight: W, (N, K).
        statistics: Of its rotated input; used by static activation scales and by rounding "gptq".
        section: The recipe's calibrate section.

    Returns:
        codes, weight_scale, and activation_step, branch.R, branch.L where the plan has them.
    """
    tensors: Tensors = {}
    residual = weight
    if layer.branch is not None:
        r_factor, l_factor = fit_branch(weight, layer.branch)
        residual = weight - dense_branch(r_factor, l_factor)
        tensors |= {"branch.R": r_factor, "branch.L": l_factor}
    rotated = rotate(residual, layer.rotation_group)
    bits = layer.weight.bits
    scale = fit_weight_scale(rotated, bits, layer.weight.group_size, section.num_clip_steps)
    if section.rounding == "gptq":
        moment = second_moment(np.concatenate(statistics.kept))
        codes = quantize_weight_gptq(rotated, scale, bits, moment)
    else:
        codes = quantize_weight(rotated, scale, bits)
    tensors |= {"weight_scale": scale, "codes": codes}
    if layer.activation.bits is not None:
        step = activation_step(layer.activation)
        if step is None:
            step = fit_tensor_scale(
                np.concatenate(statistics.kept), layer.activation.bits, section.num_clip_steps
            )
        tensors["activation_step"] = np.array([step], dtype=np.float32)
    return tensors
