"""Finding the linear layers of a denoiser and their place in its tree.

One forward pass with hooks records every `nn.Linear` inside the transformer blocks, in execution
order. The tree has three levels: block, leaf, layer. Layers of a block that read the same input
tensor (q, k and v) share a leaf, since one activation quantizer serves them all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treeq_export.model.zoo import Denoiser

_IN_BLOCK = re.compile(r"(?P<list>[^.]*blocks)\.(?P<index>\d+)\.(?P<position>.+)")


@dataclass(frozen=True)
class LinearInfo:
    """A linear layer and its place in the tree.

    Attributes:
        name: As in the checkpoint, such as "transformer_blocks.0.attn1.to_q".
        in_features: K.
        out_features: N.
        has_bias: Whether a bias is added.
        block: Number of its block in execution order, over all lists of blocks.
        position: Name inside the block.
        leaf: Number of its leaf in execution order; layers of one block with the same input share
            one.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    block: int
    position: str
    leaf: int


def discover_linears(denoiser: Denoiser) -> list[LinearInfo]:
    """Find the linears of the transformer blocks.

    Embeddings, patchify and the final layer lie outside of the blocks; the timestep and label
    embedders that diffusers keeps inside DiT blocks are left out as well.

    Args:
        denoiser: Any denoiser; it is run once on a batch of one.

    Returns:
        One record per linear that runs, in order of its first call; none where there are no blocks.
    """
    calls = _record_calls(denoiser)
    blocks: dict[tuple[str, str], int] = {}
    leaves: dict[tuple[int, int], int] = {}
    found: dict[str, LinearInfo] = {}
    for name, linear, tensor in calls:
        match = _IN_BLOCK.fullmatch(name)
        if match is None or name in found:
            continue
        block = blocks.setdefault((match["list"], match["index"]), len(blocks))
        found[name] = LinearInfo(
            name=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            has_bias=linear.bias is not None,
            block=block,
            position=match["position"],
            leaf=leaves.setdefault((block, id(tensor)), len(leaves)),
        )
    return list(found.values())


def _record_calls(denoiser: Denoiser) -> list[tuple[str, nn.Linear, Tensor]]:
    """Return name, module and input of every call of a candidate, in execution order.

    The inputs are kept alive until the caller is done with them, so that their ids stay unique.
    """
    calls: list[tuple[str, nn.Linear, Tensor]] = []
    handles = []
    for name, module in denoiser.model.named_modules():
        if isinstance(module, nn.Linear) and _IN_BLOCK.fullmatch(name) and "emb" not in name:
            handles.append(module.register_forward_pre_hook(_recorder(name, module, calls)))
    if not handles:  # a network without blocks does not run either
        return calls
    try:
        with torch.no_grad():
            denoiser(*denoiser.make_example_inputs(1, seed=0).values())
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _recorder(
    name: str, linear: nn.Linear, calls: list[tuple[str, nn.Linear, Tensor]]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((name, linear, inputs[0]))

    return record
