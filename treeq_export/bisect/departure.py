"""Bisection over a network's layers where each question costs a run.

A layer "departs" where its output inside the network is too far from the reference's. An error
shows in every layer that the faulty one feeds, so one answer settles many layers:

    departs         the fault is in this layer or in one before it in the graph
    does not        this layer and all before it are cleared

That is bisection of a history with merges: q, k and v do not feed each other, and adaLN's linears
do not feed the blocks before them. Each question splits the layers that are left as evenly as
possible. A fault whose error fades out before the layer that is asked would be missed.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from treeq_export.runners.graph_meta import LayerSite


def layers_before(model: ir.Model, sites: Sequence[LayerSite]) -> list[int]:
    """Return, for every layer, which layers feed its output, itself included, as a bit mask.

    Args:
        model: The compiled graph, its nodes in execution order.
        sites: The layers; one whose output became part of a fused node has only itself.

    Returns:
        One mask a site; bit i is layer i of `sites`.
    """
    own: dict[str | None, int] = {}
    for index, site in enumerate(sites):
        if site.output:
            own[site.output] = own.get(site.output, 0) | 1 << index
    masks: dict[ir.Value, int] = {}
    reached: dict[str | None, int] = {}
    for node in model.graph:
        before = 0
        for value in node.inputs:
            if value is not None:
                before |= masks.get(value, 0)
        for value in node.outputs:
            masks[value] = before | own.get(value.name, 0)
            reached[value.name] = masks[value]
    return [reached.get(site.output, 0) | 1 << index for index, site in enumerate(sites)]


def find_departure(before: Sequence[int], departs: Callable[[int], bool]) -> int | None:
    """Return the first layer that departs, None where none does.

    Args:
        before: From `layers_before`, for the layers that can be asked.
        departs: Whether a layer departs; asked at most once a layer.

    Returns:
        A layer that departs while no layer that feeds it does.

    >>> chain = [0b001, 0b011, 0b111]
    >>> find_departure(chain, lambda layer: layer >= 1)
    1
    """
    feeding = 0
    for layer, mask in enumerate(before):
        feeding |= mask & ~(1 << layer)
    found, cleared = None, 0
    for end in (layer for layer in range(len(before)) if not feeding >> layer & 1):
        if departs(end):
            found = end
            break
        cleared |= before[end]
    while found is not None:
        left = before[found] & ~cleared & ~(1 << found)
        if not left:
            break
        asked = _middle(before, [layer for layer in range(len(before)) if left >> layer & 1])
        if departs(asked):
            found = asked
        else:
            cleared |= before[asked]
    return found


def _middle(before: Sequence[int], suspects: list[int]) -> int:
    """Return the suspect whose answer leaves the fewest in the worse case, counting `found`."""
    mask = sum(1 << layer for layer in suspects)
    total = len(suspects) + 1

    def worse(layer: int) -> int:
        inside = (before[layer] & mask).bit_count()
        return max(inside, total - inside)

    return min(suspects, key=worse)
