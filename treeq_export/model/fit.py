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
from treeq_export.quant.gptq import (
    inverse_factor,
    quantize_weight_gptq,
    refit_weight,
    second_moment,
)
from treeq_export.quant.numerics import (
    activation_scale,
    activation_step,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from treeq_export.quant.rotation import rotate
from treeq_export.quant.scales import fit_tensor_scale, fit_weight_scale
from treeq_export.quant.spec import ActivationFormat, WeightFormat
from treeq_export.recipe import CalibrateSection

FloatArray = NDArray[np.floating]

# Multiples of the step that "fitted" tries, and the tokens that it tries them on, at most.
_STEP_FACTORS = np.linspace(0.7, 1.2, 11)
_STEP_TOKENS = 4096


@dataclass(frozen=True)
class LayerTokens:
    """The same tokens of a layer's input in two networks.

    Attributes:
        clean: X, (n, K) float32, in full precision.
        quantized: X_hat, (n, K) float32, behind the quantized layers before this one.
    """

    clean: FloatArray
    quantized: FloatArray


@dataclass(frozen=True)
class LayerFit:
    """A fitted layer.

    Attributes:
        tensors: By short name: codes, weight_scale, and activation_step, branch.R, branch.L where
            the plan has them; bias where the section asks for its correction.
        real_codes: (N, K) float32, the residual weight in units of its scale, before rounding.
    """

    tensors: Tensors
    real_codes: FloatArray


def quantize_layer(
    layer: LayerPlan,
    weight: FloatArray,
    statistics: InputStatistics,
    section: CalibrateSection,
    bias: FloatArray | None = None,
) -> Tensors:
    """Fit a layer to clean inputs.

    Args:
        layer: The layer's entry in the plan.
        weight: W, (N, K).
        statistics: Statistics of the rotated input. The layer is fitted to the kept tokens, which
            may be none if no option of the section needs them.
        section: The recipe's calibrate section. With inputs "quantized", the layer's own
            activation quantizer is made up for.
        bias: (N,) or None.

    Returns:
        The tensors of `fit_layer`.
    """
    return fit_layer(layer, weight, bias, clean_tokens(layer, statistics), section).tensors


def clean_tokens(layer: LayerPlan, statistics: InputStatistics) -> LayerTokens:
    """Return the kept tokens of a layer, not rotated; nothing before it is quantized."""
    kept = np.concatenate(statistics.kept) if statistics.kept else np.empty((0, layer.in_features))
    # The rotation is its own inverse.
    tokens = rotate(kept.astype(np.float32), layer.rotation_group)
    return LayerTokens(tokens, tokens)


def fit_layer(
    layer: LayerPlan,
    weight: FloatArray,
    bias: FloatArray | None,
    tokens: LayerTokens,
    section: CalibrateSection,
) -> LayerFit:
    """Fit a layer to tokens of its input.

    Args:
        layer: The layer's entry in the plan.
        weight: W, (N, K).
        bias: (N,) or None.
        tokens: Input of the layer, not rotated.
        section: The recipe's calibrate section.

    Returns:
        Its tensors; rounding "adaround" gets the codes of "gptq", where its training starts.
    """
    fitter = LayerFitter(layer, weight, bias, tokens, section)
    return fitter.fit(fitter.meet(layer.activation), layer.weight)


@dataclass(frozen=True)
class Met:
    """What the codes of a layer meet behind one activation quantizer, and what they should be.

    Attributes:
        step: The activation step, None where activations stay in floating point.
        tokens: (n, K), rotated and quantized.
        residual: (N, K), the residual weight to be rounded.
        upper: The factor that GPTQ needs, (K, K); None for rounding "nearest".
    """

    step: float | None
    tokens: FloatArray
    residual: FloatArray
    upper: NDArray[np.float64] | None


class LayerFitter:
    """Fits a layer in one or several formats; what formats have in common is computed once.

    Args:
        layer: The layer's entry in the plan; the weight's width and the activation do not count.
        weight: W, (N, K).
        bias: (N,) or None.
        tokens: Input of the layer, not rotated.
        section: The recipe's calibrate section.
    """

    def __init__(
        self,
        layer: LayerPlan,
        weight: FloatArray,
        bias: FloatArray | None,
        tokens: LayerTokens,
        section: CalibrateSection,
    ) -> None:
        self._bias = bias
        self._section = section
        self._branch: Tensors = {}
        residual = weight
        if layer.branch is not None:
            r_factor, l_factor = fit_branch(weight, layer.branch)
            residual = weight - dense_branch(r_factor, l_factor)
            self._branch = {"branch.R": r_factor, "branch.L": l_factor}
        self._residual = rotate(residual, layer.rotation_group)
        self._rotated = rotate(tokens.quantized, layer.rotation_group)
        self._target = _missing_beside_branch(weight, tokens, self._branch)

    def meet(self, activation: ActivationFormat) -> Met:
        """Return what weights of all widths have in common behind one activation quantizer."""
        section, residual = self._section, self._residual
        step, met = None, self._rotated
        if activation.bits is not None:
            step = _find_step(activation, self._rotated, residual, self._target, section)
            met = _fake_quantize(self._rotated, activation, step)
        refit, by_output = section.inputs == "quantized", section.rounding != "nearest"
        seen, target = met if refit else self._rotated, self._target
        if section.bias_correction:
            seen, target = seen - _mean(seen), target - _mean(target)
        moment = second_moment(seen) if refit or by_output else np.empty((0, 0))
        if refit:
            residual = refit_weight(residual, seen, target, moment)
        return Met(step, met, residual, inverse_factor(moment) if by_output else None)

    def fit(self, met: Met, weight: WeightFormat) -> LayerFit:
        """Return the layer with weights of one format behind the activation quantizer."""
        residual, section = met.residual, self._section
        bits, grid = weight.bits, weight.numbers
        scale = fit_weight_scale(residual, bits, weight.group_size, section.num_clip_steps, grid)
        if met.upper is None:
            codes = quantize_weight(residual, scale, bits, grid)
        else:
            codes = quantize_weight_gptq(residual, scale, bits, met.upper, grid)
        tensors = self._branch | {"weight_scale": scale, "codes": codes}
        if met.step is not None:
            tensors["activation_step"] = np.array([met.step], dtype=np.float32)
        if section.bias_correction:
            missed = _mean(self._target - met.tokens @ dequantize_weight(codes, scale).T)
            bias = missed if self._bias is None else self._bias + missed
            tensors["bias"] = bias.astype(np.float32)
        return LayerFit(
            tensors, residual / np.repeat(scale, residual.shape[1] // scale.shape[1], 1)
        )


def _missing_beside_branch(weight: FloatArray, tokens: LayerTokens, tensors: Tensors) -> FloatArray:
    """Return Y = X W^T - X_hat M^T, (n, N)."""
    target = tokens.clean @ weight.T
    if "branch.R" not in tensors:
        return target
    return target - apply_branch(tokens.quantized, tensors["branch.R"], tensors["branch.L"])


def _find_step(
    activation: ActivationFormat,
    rotated: FloatArray,
    residual: FloatArray,
    target: FloatArray,
    section: CalibrateSection,
) -> float:
    """Return the activation step of a layer whose activations are quantized.

    "fitted" takes the output error before the weight is rounded; with inputs "quantized", behind
    the refit of the weight, which makes up for much of what a smaller step clips.
    """
    assert activation.bits is not None
    step = activation_step(activation)
    if step is None:
        step = fit_tensor_scale(
            rotated, activation.bits, section.num_clip_steps, activation.numbers
        )
    if section.step == "gaussian" or len(rotated) == 0:
        return step
    stride = -(-len(rotated) // _STEP_TOKENS)
    rotated, target = rotated[::stride], target[::stride]

    def output_error(candidate: float) -> float:
        met = _fake_quantize(rotated, activation, candidate)
        if section.inputs == "full_precision":
            return float(np.square((met - rotated) @ residual.T).sum(dtype=np.float64))
        met, wanted = met - _mean(met), target - _mean(target)
        refitted = refit_weight(residual, met, wanted, second_moment(met))
        return float(np.square(wanted - met @ refitted.T).sum(dtype=np.float64))

    return min((float(step * factor) for factor in _STEP_FACTORS), key=output_error)


def _fake_quantize(rotated: FloatArray, activation: ActivationFormat, step: float) -> FloatArray:
    """Return what the codes of rotated activations stand for, (n, K)."""
    assert activation.bits is not None
    scale = activation_scale(rotated, activation.scale, step)
    return quantize_activation(rotated, scale, activation.bits, activation.numbers) * scale


def _mean(values: FloatArray) -> FloatArray:
    """Return the mean over tokens (n, ...); zero where there are none."""
    return values.mean(axis=0) if len(values) else np.zeros(values.shape[1], values.dtype)
