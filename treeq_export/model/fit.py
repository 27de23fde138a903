"""Fitting one layer: branch, weight scales, codes, activation step and bias.

1. The branch M is the truncated SVD of each block of W, and W' = (W - M) H_g the residual.
2. With `calibrate.inputs: quantized`, W' is refitted: from the quantized activations A that its
   codes will meet it is to give what full precision has left to do beside the branch,
   Y = X W^T - X_hat M^T (quant/gptq.py).
3. Its scales have the least squared error over a clipping grid; its codes are rounded to nearest,
   or for least output error.
4. The bias takes the mean of what is still missed. Then steps 2 and 3 see centred tokens and
   targets: a constant error costs nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeq_export.model.statistics import InputStatistics
from treeq_export.plan import LayerPlan, Tensors
from treeq_export.quant.branch import apply_branch, dense_branch, fit_branch
from treeq_export.quant.gptq import quantize_weight_gptq, refit_weight, second_moment
from treeq_export.quant.numerics import (
    activation_scale,
    activation_step,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from treeq_export.quant.rotation import rotate
from treeq_export.quant.scales import fit_tensor_scale, fit_weight_scale
from treeq_export.quant.spec import ActivationFormat
from treeq_export.recipe import CalibrateSection

FloatArray = NDArray[np.floating]

# Multiples of the Gaussian step that "fitted" tries.
_STEP_FACTORS = np.linspace(0.7, 1.3, 13)


@dataclass(frozen=True)
class LayerTokens:
    """The same tokens of a layer's input in two networks.

    Attributes:
        clean: X, (n, K) float32, in full precision.
        quantized: X_hat, (n, K) float32, behind the quantized layers before this one.
    """

    clean: FloatArray
    quantized: FloatArray


def quantize_layer(
    layer: LayerPlan,
    weight: FloatArray,
    statistics: InputStatistics,
    section: CalibrateSection,
    bias: FloatArray | None = None,
) -> Tensors:
    """Fit a layer to clean inputs.

    Args:
        layer: Its entry in the plan.
        weight: W, (N, K).
        statistics: Of its rotated input; the kept tokens are what it is fitted to. None may have
            been kept where the section asks for nothing that needs them.
        section: The recipe's calibrate section. With inputs "quantized", the layer's own
            activation quantizer is made up for.
        bias: (N,) or None.

    Returns:
        As `fit_layer`.
    """
    kept = np.concatenate(statistics.kept) if statistics.kept else np.empty((0, layer.in_features))
    # The rotation is its own inverse.
    tokens = rotate(kept.astype(np.float32), layer.rotation_group)
    return fit_layer(layer, weight, bias, LayerTokens(tokens, tokens), section)


def fit_layer(
    layer: LayerPlan,
    weight: FloatArray,
    bias: FloatArray | None,
    tokens: LayerTokens,
    section: CalibrateSection,
) -> Tensors:
    """Return one layer's tensors by short name.

    Args:
        layer: Its entry in the plan.
        weight: W, (N, K).
        bias: (N,) or None.
        tokens: Its input, not rotated.
        section: The recipe's calibrate section.

    Returns:
        codes, weight_scale, and activation_step, branch.R, branch.L where the plan has them; bias
        where the section asks for its correction.
    """
    tensors: Tensors = {}
    residual = weight
    if layer.branch is not None:
        r_factor, l_factor = fit_branch(weight, layer.branch)
        residual = weight - dense_branch(r_factor, l_factor)
        tensors |= {"branch.R": r_factor, "branch.L": l_factor}
    residual = rotate(residual, layer.rotation_group)
    rotated = rotate(tokens.quantized, layer.rotation_group)
    met = rotated
    if layer.activation.bits is not None:
        step = _find_step(layer.activation, rotated, residual, section)
        met = _fake_quantize(rotated, layer.activation, step)
        tensors["activation_step"] = np.array([step], dtype=np.float32)
    target = _missing_beside_branch(weight, tokens, tensors)
    tensors |= _fit_codes(
        layer, residual, met if section.inputs == "quantized" else rotated, target, section
    )
    if section.bias_correction:
        reached = met @ dequantize_weight(tensors["codes"], tensors["weight_scale"]).T
        missed = _mean(target - reached)
        tensors["bias"] = (missed if bias is None else bias + missed).astype(np.float32)
    return tensors


def _missing_beside_branch(weight: FloatArray, tokens: LayerTokens, tensors: Tensors) -> FloatArray:
    """Return Y = X W^T - X_hat M^T, (n, N)."""
    target = tokens.clean @ weight.T
    if "branch.R" not in tensors:
        return target
    return target - apply_branch(tokens.quantized, tensors["branch.R"], tensors["branch.L"])


def _fit_codes(
    layer: LayerPlan,
    residual: FloatArray,
    met: FloatArray,
    target: FloatArray,
    section: CalibrateSection,
) -> Tensors:
    """Return codes and weight_scale of the rotated residual weight (N, K)."""
    if section.bias_correction:
        met, target = met - _mean(met), target - _mean(target)
    compensate = section.inputs == "quantized"
    moment = second_moment(met) if compensate or section.rounding == "gptq" else None
    if compensate and moment is not None:
        residual = refit_weight(residual, met, target, moment)
    bits = layer.weight.bits
    scale = fit_weight_scale(residual, bits, layer.weight.group_size, section.num_clip_steps)
    if section.rounding == "gptq" and moment is not None:
        codes = quantize_weight_gptq(residual, scale, bits, moment)
    else:
        codes = quantize_weight(residual, scale, bits)
    return {"weight_scale": scale, "codes": codes}


def _find_step(
    activation: ActivationFormat,
    rotated: FloatArray,
    residual: FloatArray,
    section: CalibrateSection,
) -> float:
    """Return the activation step of a layer whose activations are quantized."""
    assert activation.bits is not None
    step = activation_step(activation)
    if step is None:
        step = fit_tensor_scale(rotated, activation.bits, section.num_clip_steps)
    if section.step == "gaussian" or len(rotated) == 0:
        return step

    def output_error(candidate: float) -> float:
        noise = _fake_quantize(rotated, activation, candidate) - rotated
        return float(np.square(noise @ residual.T).sum(dtype=np.float64))

    return min((float(step * factor) for factor in _STEP_FACTORS), key=output_error)


def _fake_quantize(rotated: FloatArray, activation: ActivationFormat, step: float) -> FloatArray:
    """Return what the codes of rotated activations stand for, (n, K)."""
    assert activation.bits is not None
    scale = activation_scale(rotated, activation.scale, step)
    return quantize_activation(rotated, scale, activation.bits) * scale


def _mean(values: FloatArray) -> FloatArray:
    """Return the mean over tokens (n, ...); zero where there are none."""
    return values.mean(axis=0) if len(values) else np.zeros(values.shape[1], values.dtype)
