"""One layer's line of an audit."""

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.plan import LayerPlan
from treeq_export.records import AuditLayer

MISSING = "not found"


def digest_of(array: NDArray[Any]) -> str:
    """Return the digest by which a stored weight is found."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def audit_entry(
    layer: LayerPlan, kinds: Collection[str], integer_kinds: Collection[str]
) -> AuditLayer:
    """Return the entry of a layer.

    Args:
        layer: The layer's plan.
        kinds: What was found to read the layer's weight.
        integer_kinds: Those of them that are integer arithmetic.
    """
    return AuditLayer(
        name=layer.name,
        op_type=" + ".join(sorted(set(kinds))) or MISSING,
        integer=bool(kinds) and all(kind in integer_kinds for kind in kinds),
        weight_only=layer.activation.bits is None,
    )
