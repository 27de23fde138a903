"""The late import of cuda-python: its modules, or one line that says what to install."""

import importlib
from typing import Any

from treeq_export.errors import RunnerError


def load_driver() -> Any:
    """Return the module `cuda.bindings.driver`.

    Raises:
        RunnerError: cuda-python is not installed.
    """
    return _load("driver")


def load_cudart() -> Any:
    """Return the module `cuda.bindings.runtime`.

    Raises:
        RunnerError: cuda-python is not installed.
    """
    return _load("runtime")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise RunnerError(
            f"cuda-python: cannot be imported ({error}). Run `pip install 'cuda-python>=12.9'`."
        ) from error
