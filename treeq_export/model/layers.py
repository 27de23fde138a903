"""Finding the linear layers of a denoiser and their place in its tree.

One forward pass with hooks records every `nn.Linear` inside the transformer blocks, in execution
order. The tree has three levels: block, leaf, layer. Layers of a block that read the same input
tensor (q, k and v) share a leaf, since one activation quantizer serves them all.

A layer on whose output no prediction depends (the text half of a last joint block) is left out: no
graph has it. A gradient of NaN finds those, since NaN survives weights and gates that are zero, as
those of an untrained network are, and is stopped only where the network drops a value. A forward
pass with NaN in the outputs of the layers so found confirms it, since gradients also stop at what
has no derivative.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from treeq_export.errors import CheckpointError
from treeq_export.model.zoo import Denoiser

_IN_BLOCK = re.compile(r"(?P<list>[^.]*blocks)\.(?P<index>\d+)\.(?P<position>.+)")

_SIZE_KEYS = (  # of a config.json, which have to fit each other
    "num_attention_heads",
    "attention_head_dim",
    "axes_dims_rope",
    "cross_attention_dim",
    "joint_attention_dim",
    "caption_projection_dim",
)


@dataclass(frozen=True)
class LinearInfo:
    """A linear layer and its place in the tree.

    Attributes:
        name: Name in the checkpoint, such as "transformer_blocks.0.attn1.to_q".
        in_features: Input features K.
        out_features: Output features N.
        has_bias: Whether a bias is added.
        block: Number of the block in execution order, over all lists of blocks.
        position: Name inside the block.
        leaf: Number of the leaf in execution order; layers of one block with the same input share
            one.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    block: int
    position: str
    leaf: int


@dataclass(frozen=True)
class Discovery:
    """What a network has.

    Attributes:
        linears: The layers that can be quantized, in order of their first call.
        unused: Names of layers that run, but on which no prediction depends.
    """

    linears: list[LinearInfo]
    unused: list[str]

    @property
    def note(self) -> str | None:
        """What a person should know of it, in one sentence."""
        if not self.unused:
            return None
        many = len(self.unused) > 1
        layers = f"layer{'s' * many} that no output depends on {'are' if many else 'is'}"
        return f"{len(self.unused)} {layers} left out: {', '.join(self.unused)}."


def discover_linears(denoiser: Denoiser) -> list[LinearInfo]:
    """Return the linears of `discover`."""
    return discover(denoiser).linears


def discover(denoiser: Denoiser) -> Discovery:
    """Find the linears of the transformer blocks.

    Embeddings, patchify and the final layer lie outside of the blocks; the timestep and label
    embedders that diffusers keeps inside DiT blocks are left out as well.

    Args:
        denoiser: Any denoiser; it is run on a batch of one.

    Returns:
        One record per linear that runs and matters; none where there are no blocks.

    Raises:
        CheckpointError: The network cannot run, or runs a layer more than once.
    """
    candidates = {
        name: module
        for name, module in denoiser.model.named_modules()
        if isinstance(module, nn.Linear) and _IN_BLOCK.fullmatch(name) and "emb" not in name
    }
    if not candidates:  # a network without blocks does not run either
        return Discovery([], [])
    calls, unreached = _record_calls(denoiser, candidates)
    unused = _confirm_unused(denoiser, candidates, unreached)
    blocks: dict[tuple[str, str], int] = {}
    leaves: dict[tuple[int, int], int] = {}
    found: dict[str, LinearInfo] = {}
    for name, tensor in calls:
        match = _IN_BLOCK.fullmatch(name)
        if match is None or name in unused:
            continue
        if name in found:
            raise CheckpointError(
                f"{denoiser.class_name}: {name} runs more than once in one pass, and a layer has "
                "one input in calibration. Use a model that runs it once."
            )
        block = blocks.setdefault((match["list"], match["index"]), len(blocks))
        linear = candidates[name]
        found[name] = LinearInfo(
            name=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            has_bias=linear.bias is not None,
            block=block,
            position=match["position"],
            leaf=leaves.setdefault((block, tensor), len(leaves)),
        )
    return Discovery(list(found.values()), unused)


def _record_calls(
    denoiser: Denoiser, candidates: Mapping[str, nn.Linear]
) -> tuple[list[tuple[str, int]], list[str]]:
    """Return name and input's number of every call in execution order, and who gets no gradient.

    Inputs are kept while their block runs, so that a number stands for one tensor.
    """
    calls: list[tuple[str, int]] = []
    reached: set[str] = set()
    kept: dict[int, tuple[int, Tensor]] = {}
    numbers, current = count(), ""

    def number_of(name: str, tensor: Tensor) -> int:
        nonlocal current
        match = _IN_BLOCK.fullmatch(name)
        block = name[: match.start("position")] if match else ""
        if block != current:
            kept.clear()
            current = block
        if id(tensor) not in kept:
            kept[id(tensor)] = next(numbers), tensor
        return kept[id(tensor)][0]

    def mark(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all() or gradient.any():
            reached.add(name)

    def record(name: str, _module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append((name, number_of(name, inputs[0])))
        tracked = output.requires_grad_()
        tracked.register_hook(partial(mark, name))
        return tracked

    with ExitStack() as stack:
        for name, module in candidates.items():
            stack.callback(module.register_forward_hook(partial(record, name)).remove)
        with torch.enable_grad():
            prediction = _run(denoiser)
            if prediction.requires_grad:
                prediction.backward(torch.full_like(prediction, torch.nan))
    ran = dict.fromkeys(name for name, _ in calls)
    return calls, [name for name in ran if name not in reached]


@torch.no_grad()
def _confirm_unused(
    denoiser: Denoiser, candidates: Mapping[str, nn.Linear], suspects: Sequence[str]
) -> list[str]:
    """Return the layers whose output may be NaN without the prediction being so."""

    def is_unused(names: Sequence[str]) -> bool:
        with ExitStack() as stack:
            for name in names:
                hook = candidates[name].register_forward_hook(_put_nan)
                stack.callback(hook.remove)
            return bool(torch.isfinite(_run(denoiser)).all())

    if not suspects or is_unused(suspects):
        return list(suspects)
    return [name for name in suspects if is_unused([name])]


def _put_nan(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return torch.full_like(output, torch.nan)


def _run(denoiser: Denoiser) -> Tensor:
    """Return the prediction for one row.

    Raises:
        CheckpointError: The network cannot run: its configuration contradicts itself.
    """
    inputs = denoiser.make_example_inputs(1, seed=0)
    try:
        return denoiser.prediction(denoiser(*inputs.values()))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        if "allocate" in reason or "out of memory" in reason:
            raise
        config = getattr(denoiser.model, "config", {})
        sizes = ", ".join(f"{key} {config[key]}" for key in _SIZE_KEYS if key in config)
        raise CheckpointError(
            f"{denoiser.class_name}: a network of this config.json can be built but not run "
            f"({reason[:200]}). Compare it with the published one: {sizes or 'all sizes'}."
        ) from error
