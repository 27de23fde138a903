"""One layer's line of an audit."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    layer: LayerPlan,
    forms: Iterable[NDArray[Any]],
    readers: Mapping[str, Sequence[str]],
    integer_kinds: Collection[str],
) -> AuditLayer:
    """Return the entry of a layer.

    Args:
        layer: The layer's plan.
        forms: All ways to store the layer's weight.
        readers: Kinds of readers by digest of a stored weight.
        integer_kinds: Readers that are integer arithmetic.
    """
    kinds = {kind for array in forms for kind in readers.get(digest_of(array), ())}
    return AuditLayer(
        name=layer.name,
        op_type=" + ".join(sorted(kinds)) or MISSING,
        integer=bool(kinds) and kinds <= set(integer_kinds),
        weight_only=layer.activation.bits is None,
    )
