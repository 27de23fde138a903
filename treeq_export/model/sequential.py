"""Walking through the network in execution order, each layer fitted to what it will really see.

Two sets of activations are carried from block to block: those of the full-precision model, and
those of a working copy whose layers up to there are quantized already. For every leaf, the block
is run on both up to the leaf's first linear; equal tokens of both inputs are what its layers are
fitted to. Only one block runs at a time (model/replay.py) and only the outputs of the last one are
kept, so time is linear in the number of blocks, and memory does not depend on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treeq_export.model.fit import FloatArray, LayerFit, LayerTokens
from treeq_export.model.quantized import linear_of, quantize_model, replace_linear
from treeq_export.model.reconstruct import BlockCall
from treeq_export.model.replay import BlockReplay, Output
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan, Plan, Tensors
from treeq_export.progress import OnStep

# Entry in the plan, weight (N, K), bias (N,) or None, tokens -> the fitted layer.
FitLayer = Callable[[LayerPlan, FloatArray, FloatArray | None, LayerTokens], LayerFit]
# Working copy, name of a block, real codes of its layers, its calls -> new tensors by layer.
Reconstruct = Callable[
    [Denoiser, str, Mapping[str, FloatArray], Sequence[BlockCall]], dict[str, Tensors]
]
Leaf = list[LayerPlan]


class _EndOfLeafError(Exception):
    """Ends a forward pass at the leaf whose input is wanted; not seen outside."""


def group_leaves(layers: Sequence[LayerPlan]) -> list[list[Leaf]]:
    """Return the layers by block and, in a block, by leaf; both in execution order."""
    blocks: dict[int, dict[int, Leaf]] = {}
    for layer in layers:
        blocks.setdefault(layer.tree.block, {}).setdefault(layer.tree.leaf, []).append(layer)
    return [[leaves[leaf] for leaf in sorted(leaves)] for _, leaves in sorted(blocks.items())]


def arrays_of(linear: nn.Linear) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return weight (N, K) and bias (N,) of a linear as arrays that share its memory."""
    bias = None if linear.bias is None else linear.bias.detach().numpy()
    return linear.weight.detach().numpy(), bias


class TokenChoice:
    """Which tokens of a leaf's input are kept: random ones, equal in both networks.

    Args:
        max_tokens: Tokens of one leaf, over all batches; rounded up to equal shares.
        num_batches: Batches that share them.
        seed: Seed of the choice of tokens.
    """

    def __init__(self, max_tokens: int, num_batches: int, seed: int) -> None:
        self.share = math.ceil(max_tokens / num_batches)
        self.seed = seed

    def __call__(self, x: Tensor, leaf: int, batch: int) -> NDArray[np.float32]:
        """Return the kept tokens (n, K) of an input (..., K) of one batch."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        if len(tokens) <= self.share:
            return tokens.numpy().copy()
        drawn = np.random.default_rng((self.seed, leaf, batch)).permutation(len(tokens))
        return tokens.numpy()[np.sort(drawn[: self.share])]


class _Activations:
    """One network, and the outputs of the last block that it has run, batch by batch."""

    def __init__(self, denoiser: Denoiser, blocks: list[str], batches: Sequence[Rows]) -> None:
        self.denoiser = denoiser
        self.replay = BlockReplay(denoiser, blocks)
        self.batches = batches
        self.outputs: list[Output] = [()] * len(batches)
        self._shapes: list[Output] = []  # of the outputs of one batch, block by block

    def run(self, block: int, batch: int) -> Output:
        """Run one block on what the block before has left."""

        def recorded(index: int) -> Output:
            # What lies further back passes through unread; only its shape counts.
            return self.outputs[batch] if index == block - 1 else self._shapes[index]

        return self.replay.run(self.batches[batch], first=block, last=block, recorded=recorded)

    def finish(self, block: int) -> None:
        """Run one block as it is now and go on to the next."""
        self.advance([self.run(block, batch) for batch in range(len(self.batches))])

    def advance(self, outputs: list[Output]) -> None:
        """Go on to the next block with the outputs of this one."""
        self.outputs = outputs
        self._shapes.append(
            tuple(None if x is None else torch.zeros(1).expand(x.shape) for x in outputs[-1])
        )


class SequentialWalk:
    """Fits all layers of a plan in execution order.

    Args:
        denoiser: The full-precision model; it is left as it is.
        plan: The plan.
        rows: Network inputs.
        batch_size: Rows of one forward pass.
        max_tokens: Tokens kept of each leaf's input.
        seed: Seed of the choice of tokens.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        rows: Rows,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.leaves = group_leaves(plan.layers)
        blocks = plan.block_names
        num_rows = len(next(iter(rows.values())))
        # Rows come in the order of sampling; a batch is to hold all kinds of timesteps.
        order = torch.from_numpy(np.random.default_rng(seed).permutation(num_rows))
        rows = {name: tensor[order] for name, tensor in rows.items()}
        batches = [
            {name: tensor[start : start + batch_size] for name, tensor in rows.items()}
            for start in range(0, num_rows, batch_size)
        ]
        nothing = plan.model_copy(update={"layers": ()})
        self.clean = _Activations(denoiser, blocks, batches)
        self.working = _Activations(quantize_model(denoiser, nothing, {}), blocks, batches)
        self.choose = TokenChoice(max_tokens, len(batches), seed)

    def run(
        self,
        fit: FitLayer,
        on_step: OnStep,
        reconstruct: Reconstruct | None = None,
    ) -> Tensors:
        """Fit every layer and return `<layer>.<tensor>` to array.

        Args:
            fit: Fits one layer.
            on_step: Called with the fraction done, 0..1.
            reconstruct: Improves the layers of a block together, once all have been fitted.
        """
        tensors: Tensors = {}
        with self.clean.replay, self.working.replay:
            for block in range(len(self.leaves)):
                fits = self._fit_block(block, fit, lambda part: on_step(part / len(self.leaves)))
                short = {name: fitted.tensors for name, fitted in fits.items()}
                if reconstruct is not None:
                    real_codes = {name: fitted.real_codes for name, fitted in fits.items()}
                    name = self.working.replay.blocks[block]
                    calls = self._record_calls(block, name)
                    short |= reconstruct(self.working.denoiser, name, real_codes, calls)
                self.working.finish(block)
                tensors |= {
                    f"{layer}.{name}": value
                    for layer, values in short.items()
                    for name, value in values.items()
                }
                on_step((block + 1) / len(self.leaves))
        return tensors

    def _fit_block(self, block: int, fit: FitLayer, on_step: OnStep) -> dict[str, LayerFit]:
        """Fit the layers of one block; `on_step` gets the number of blocks done."""
        leaves = self.leaves[block]
        fits: dict[str, LayerFit] = {}
        clean = self._run_clean(block, leaves)
        for done, leaf in enumerate(leaves, start=1):
            tokens = LayerTokens(clean.pop(leaf[0].tree.leaf), self._run_to(block, leaf))
            for layer in leaf:
                linear = linear_of(self.clean.denoiser, layer)
                fits[layer.name] = fit(layer, *arrays_of(linear), tokens)
                replace_linear(self.working.denoiser, layer, fits[layer.name].tensors)
            on_step(block + 0.5 * done / len(leaves))
        return fits

    def _record_calls(self, block: int, name: str) -> list[BlockCall]:
        """Return the calls of one block of the working copy, with full precision's outputs."""
        calls: list[BlockCall] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(BlockCall(args, dict(kwargs), self.clean.outputs[len(calls)]))

        module = self.working.denoiser.model.get_submodule(name)
        with module.register_forward_pre_hook(hook, with_kwargs=True):
            for batch in range(len(self.working.batches)):
                self.working.run(block, batch)
        return calls

    def _run_clean(self, block: int, leaves: Sequence[Leaf]) -> dict[int, NDArray[np.float32]]:
        """Run one block in full precision; return the kept tokens of its leaves by number."""
        kept: dict[int, list[NDArray[np.float32]]] = {leaf[0].tree.leaf: [] for leaf in leaves}

        def observe(leaf: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                kept[leaf].append(self.choose(inputs[0], leaf, len(kept[leaf])))

            return hook

        with ExitStack() as stack:
            for leaf in leaves:
                linear = linear_of(self.clean.denoiser, leaf[0])
                hook = observe(leaf[0].tree.leaf)
                stack.enter_context(linear.register_forward_pre_hook(hook))
            self.clean.finish(block)
        return {leaf: np.concatenate(tokens) for leaf, tokens in kept.items()}

    def _run_to(self, block: int, leaf: Leaf) -> NDArray[np.float32]:
        """Run one block of the working copy up to a leaf; return the kept tokens of its input."""
        kept: list[NDArray[np.float32]] = []

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(self.choose(inputs[0], leaf[0].tree.leaf, len(kept)))
            raise _EndOfLeafError

        with linear_of(self.working.denoiser, leaf[0]).register_forward_pre_hook(hook):
            for batch in range(len(self.working.batches)):
                with suppress(_EndOfLeafError):
                    self.working.run(block, batch)
        return np.concatenate(kept)
