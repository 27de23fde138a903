"""Which instructions ran: the cubins that Triton launched, read back as SASS by treeq_gpu.audit."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from treeq_gpu import launch
from treeq_gpu.audit import audit_cubin
from treeq_gpu.instantiations import Instantiation


class _Recorded:
    """A kernel of Triton that keeps what each launch was compiled to."""

    def __init__(self, kernel: Any, keep: Callable[[Any], None]) -> None:
        self._kernel, self._keep = kernel, keep

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self._keep(self._kernel[grid](*args, **options))


@contextmanager
def recorded_kernels() -> Iterator[dict[str, tuple[Instantiation, Any]]]:
    """Yield the kernels that are launched inside the block, compiled, by name."""
    found: dict[str, tuple[Instantiation, Any]] = {}
    current: list[Instantiation] = []
    plain: Callable[..., None] = launch.launch

    def keep(compiled: Any) -> None:
        found[current[-1].name] = (current[-1], compiled)

    def record(instantiation: Instantiation, grid: Any, *args: Any) -> None:
        current.append(instantiation)
        plain(instantiation, grid, *args)

    recorded = {name: _Recorded(kernel, keep) for name, kernel in launch.KERNELS.items()}
    with (
        mock.patch.object(launch, "launch", record),
        mock.patch.dict(launch.KERNELS, recorded),
    ):
        yield found


def audit_recorded(
    kernels: dict[str, tuple[Instantiation, Any]], architecture: str
) -> list[dict[str, Any]]:
    """Return registers, stack, shared memory and MMA of every recorded kernel.

    Args:
        kernels: From `recorded_kernels`.
        architecture: The GPU's, for example "sm_90".
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="treeq-sass-") as folder:
        for name, (instantiation, compiled) in sorted(kernels.items()):
            path = Path(folder) / f"{name}.cubin"
            path.write_bytes(compiled.asm["cubin"])
            audit = audit_cubin(path, instantiation, architecture)
            shared = compiled.metadata.shared
            rows.append({"kernel": name, "shared_bytes": shared} | audit)
    return rows
