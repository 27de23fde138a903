"""From a Diffusion Transformer checkpoint to a validated, timed low-bit engine."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `treeq_export.api`, which loads PyTorch, when it is first used."""
    if name == "api":
        return importlib.import_module(f"{__name__}.api")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
