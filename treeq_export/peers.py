"""Other toolkits' post-training quantization of the same layers, fake-quantized, to compare with.

NVIDIA Model Optimizer (extra `modelopt`), its own calibration, with formats that it is known for:

    modelopt_int8_max       W8A8, one scale per output channel and one per activation tensor
    modelopt_svdquant_w4a4  W4 in groups of 64, A4 per token, AWQ smoothing, a branch of rank 32
    modelopt_awq_w4         W4 in groups of 128, activations in floating point, AWQ smoothing

SVDQuant is calibrated with one scale per activation tensor, the only kind that its smoothing
accepts beside 4-bit floating point, which needs a GPU; then its activations get a scale per token,
as in the paper. On digits that divides the network's error by three.

The package is imported late: that takes seconds, and it is not needed for anything else.
Source: Li et al., SVDQuant, 2024; Lin et al., AWQ, 2023.
"""

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from treeq_export.errors import RecipeError, RunnerError
from treeq_export.model.trajectories import Rows, predict
from treeq_export.model.zoo import Denoiser

_BATCH_SIZE = 50

Quantizer = dict[str, Any]  # fields of ModelOpt's QuantizerAttributeConfig


@dataclass(frozen=True)
class Peer:
    """One method of another toolkit.

    Attributes:
        label: For tables.
        weight_bits: Bits of a weight, without scales and branch.
        activation_bits: Bits of an activation; 32 where it stays in floating point.
        weight: Configuration of the weight quantizers.
        activation: Configuration of the input quantizers; None leaves them off.
        algorithm: Calibration.
        per_token: Whether activations get a scale per token after calibration.
    """

    label: str
    weight_bits: int
    activation_bits: int
    weight: Quantizer
    activation: Quantizer | None
    algorithm: str | dict[str, Any]
    per_token: bool = False


PEERS: dict[str, Peer] = {
    "modelopt_int8_max": Peer(
        "ModelOpt INT8 max",
        weight_bits=8,
        activation_bits=8,
        weight={"num_bits": 8, "axis": 0},
        activation={"num_bits": 8, "axis": None},
        algorithm="max",
    ),
    "modelopt_svdquant_w4a4": Peer(
        "ModelOpt SVDQuant W4A4",
        weight_bits=4,
        activation_bits=4,
        weight={"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}},
        activation={"num_bits": 4, "axis": None},
        algorithm={"method": "svdquant", "lowrank": 32},
        per_token=True,
    ),
    "modelopt_awq_w4": Peer(
        "ModelOpt AWQ W4",
        weight_bits=4,
        activation_bits=32,
        weight={"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
        activation=None,
        algorithm={"method": "awq_lite"},
    ),
}


def quantize_with_peer(
    name: str, denoiser: Denoiser, layer_names: Sequence[str], rows: Rows
) -> Denoiser:
    """Return a fake-quantized copy of a model, made by another toolkit.

    Args:
        name: One of `PEERS`.
        denoiser: The full-precision model; it is left as it is.
        layer_names: The linears to quantize, as in a plan.
        rows: Network inputs to calibrate on.

    Returns:
        The copy, in eval mode; all other layers are in full precision.

    Raises:
        RecipeError: No such peer.
        RunnerError: The package is not installed, or it did not quantize these layers.
    """
    if name not in PEERS:
        raise RecipeError(f"{name}: no such peer. Known: {', '.join(PEERS)}.")
    peer = PEERS[name]
    quantized = copy.deepcopy(denoiser)

    def calibrate(_: nn.Module) -> None:
        predict(quantized, rows, _BATCH_SIZE)

    with _quiet():
        quantization = _import_modelopt(name)
        quantization.quantize(quantized.model, _make_config(peer, layer_names), calibrate)
        if peer.per_token:
            _scale_per_token(quantization, quantized, layer_names)
    _check_layers(name, quantized, set(layer_names))
    return quantized.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's progress off stdout, which belongs to results, and its warnings off."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _import_modelopt(name: str) -> ModuleType:
    try:
        return importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise RunnerError(
            f"{name}: needs nvidia-modelopt, which cannot be imported ({error}). "
            "Install it with `pip install 'treeq-export[modelopt]'`, or leave this peer out."
        ) from error


def _scale_per_token(
    quantization: ModuleType, quantized: Denoiser, layer_names: Sequence[str]
) -> None:
    fields = {"num_bits": 4, "type": "dynamic", "block_sizes": {-1: None}}
    entries = [{"quantizer_name": f"{name}.input_quantizer", "cfg": fields} for name in layer_names]
    quantization.set_quantizer_by_cfg(quantized.model, entries)
    for name in layer_names:
        # Else the calibrated scale of the whole tensor stays in use.
        quantizer: Any = quantized.model.get_submodule(f"{name}.input_quantizer")
        quantizer.reset_amax()


def enabled_quantizers(denoiser: Denoiser) -> dict[str, list[str]]:
    """Return the enabled quantizers of every layer: "weight_quantizer", "input_quantizer", ..."""
    found: dict[str, list[str]] = {}
    for name, module in denoiser.model.named_modules():
        layer, _, kind = name.rpartition(".")
        if kind.endswith("_quantizer") and getattr(module, "is_enabled", False):
            found.setdefault(layer, []).append(kind)
    return found


def _check_layers(name: str, quantized: Denoiser, expected: set[str]) -> None:
    """Check that exactly the expected layers are quantized; a pattern that fits none is silent."""
    received = set(enabled_quantizers(quantized))
    if received != expected:
        first = sorted(received ^ expected)[0]
        state = "is quantized, expected not" if first in received else "is not quantized"
        raise RunnerError(
            f"{name}: {first} {state}. Use nvidia-modelopt 0.47, with which this was tested."
        )


def _make_config(peer: Peer, layer_names: Sequence[str]) -> dict[str, Any]:
    """Return ModelOpt's configuration: everything off but the quantizers of these layers."""
    kinds = {"weight_quantizer": peer.weight, "input_quantizer": peer.activation}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"{layer}.{kind}", "cfg": fields}
        for layer in layer_names
        for kind, fields in kinds.items()
        if fields is not None
    ]
    return {"quant_cfg": entries, "algorithm": peer.algorithm}
