"""The optimization profile that an engine is built with, in the model's metadata.

`treeq.batch_profile` is JSON: {input: {"min": shape, "opt": shape, "max": shape}}, one entry per
graph input, with the batch put in for the dynamic axes.
"""

import json

import onnx_ir as ir

from treeq_export.errors import CompileError
from treeq_export.runners.graph_meta import PROFILE_KEY

_MIN_BATCH = 1


def write_batch_profile(model: ir.Model, opt_batch: int, max_batch: int) -> None:
    """Put the profile of a model's inputs into its metadata.

    Args:
        model: The model; every dynamic axis is the batch.
        opt_batch: Batch that the engine is tuned for.
        max_batch: Largest batch.

    Raises:
        CompileError: An input's rank is not known.
    """
    batches = {"min": _MIN_BATCH, "opt": opt_batch, "max": max_batch}
    profile: dict[str, dict[str, list[int]]] = {}
    for value in model.graph.inputs:
        if value.shape is None or value.name is None:
            raise CompileError(f"{value.name}: the exported graph does not say its shape.")
        dims = list(value.shape)
        profile[value.name] = {
            key: [dim if isinstance(dim, int) else batch for dim in dims]
            for key, batch in batches.items()
        }
    model.metadata_props[PROFILE_KEY] = json.dumps(profile)
