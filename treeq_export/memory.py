"""Too little memory as one line that names what to lower, whichever library ran out of it.

PyTorch raises RuntimeError on the CPU and OutOfMemoryError on a GPU, NumPy MemoryError, ONNX
Runtime an exception of its own; a size that no machine could have is a RuntimeError, ValueError or
OverflowError. What they say is the only thing that tells them from other faults.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from treeq_export.environment import available_memory
from treeq_export.errors import OutOfMemoryError

_SIGNS = re.compile(
    "|".join(
        (
            r"out of memory",  # CUDA, Triton, TensorRT
            r"can(?:'t|not) allocate memory|not enough memory",  # PyTorch's CPU allocator, ENOMEM
            r"bad_alloc|bad allocation",  # C++
            r"failed to allocate memory",  # ONNX Runtime
            r"_ALLOC_FAILED|cudaErrorMemoryAllocation",  # cuBLAS, cuDNN, CUDA
            r"unable to (?:mmap|allocate) \d",  # mapped files, NumPy
            # Sizes beyond 64 bits; some have wrapped around to a negative number.
            r"storage size (?:calculation )?overflowed|integer multiplication overflow",
            r"SafeIntOnOverflow|Shape\.Size\(\) must be >= 0",  # ONNX Runtime
            r"negative dimension -\d{9,}|negative dimensions are not allowed",
            r"maximum allowed (?:dimension|size) exceeded|array is too big",  # NumPy
            r"overflow when unpacking long|int too large to convert",
            r"cannot fit 'int' into an index-sized integer",
        )
    ),
    re.IGNORECASE,
)
_WANTED = re.compile(
    r"(?:allocate|buffer of size:?) (?P<size>\d+(?:\.\d+)?) ?(?P<prefix>[KMGTPE]?)", re.IGNORECASE
)
_PREFIXES = " KMGTPE"  # powers of 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out."""
    return _root(error) is not None


def _root(error: BaseException) -> BaseException | None:
    """Return the error of the chain that says that memory ran out."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, MemoryError) or _SIGNS.search(str(found)):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def out_of_memory(where: str, keys: Sequence[str], wanted: float | None = None) -> OutOfMemoryError:
    """Return the one line.

    Args:
        where: What was at work: a stage, or a command.
        keys: Keys of the recipe whose values take memory there.
        wanted: Bytes that were asked for, where they are known.
    """
    size = ""
    if wanted is not None:
        most = available_memory() / 1e9
        size = f" (it asked for {wanted / 1e9:,.1f} GB at once; there are {most:,.1f} GB in all)"
    *first, last = keys or ("",)
    listed = f"{', '.join(first)} or {last}" if first else last
    lower = f"Lower {listed} in the recipe, or use" if keys else "Use"
    return OutOfMemoryError(f"{where}: out of memory{size}. {lower} a machine with more memory.")


@contextmanager
def explain_memory(where: str, keys: Sequence[str]) -> Iterator[None]:
    """Raise what says that memory ran out, within the block, as one line.

    Args:
        where: What was done, such as a stage.
        keys: Keys of the recipe whose values take memory there.

    Raises:
        OutOfMemoryError: Memory ran out, or a size is beyond all memory.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        root = _root(error)
        if root is None:
            raise
        raise out_of_memory(where, keys, _wanted_bytes(str(root))) from error


def _wanted_bytes(message: str) -> float | None:
    """Return the bytes that a library says it tried to allocate."""
    found = _WANTED.search(message)
    if found is None:
        return None
    return float(found["size"]) * 1024 ** _PREFIXES.index(found["prefix"].upper() or " ")
