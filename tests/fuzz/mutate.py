"""Seeded damage of files: what disks, editors, other versions and other people do to them."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

_NUMBERS = (0, -1, 1, 255, 256, 1 << 31, (1 << 31) - 1, 1 << 63, (1 << 64) - 1, 10**25, -(1 << 63))
_LONG = "9" * 5000
_VALUES: tuple[Any, ...] = (
    *_NUMBERS,
    *(0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(None, True, "", "x", "a" * 5000, "\0", "\ud800", "\x1b[2J", "../../etc/passwd"),
    *([], {}, [[]], {"a": 1}, [1, "a", None]),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return damaged data; one to three kinds of damage."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_KINDS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32)) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 8, 100, 2000)))
    return data[:end] + data[start:end] * rng.choice((1, 2, 100)) + data[end:]


def _splice(data: bytes, rng: random.Random) -> bytes:
    start, end = (rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    new = rng.choice(
        (
            b"\0",
            b"\xff\xfe",
            _LONG.encode(),
            b"[" * 2000,
            b'{"a":' * 2000,
            b"&a [*a]",
            b"!!int x",
            b"\x1b[2J",
            rng.randbytes(rng.choice((1, 4, 64))),
        )
    )
    start = rng.randrange(len(data) + 1)
    return data[:start] + new + data[start + rng.choice((0, len(new))) :]


def _extreme(data: bytes, rng: random.Random) -> bytes:
    """Put an extreme number in the place of four or eight bytes."""
    kind, size = rng.choice((("<I", 4), ("<Q", 8), (">Q", 8)))
    if len(data) < size:
        return data
    start = rng.choice((0, rng.randrange(len(data) - size + 1)))
    value = rng.choice(_NUMBERS) % (1 << 8 * size)
    return data[:start] + struct.pack(kind, value) + data[start + size :]


def _json(data: bytes, rng: random.Random) -> bytes:
    """Change one value of a JSON text, or of the header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header = 0 < size <= len(data) - 8
    text = data[8 : 8 + size] if header else data
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _flip(data, rng)
    new = _change(value, rng).encode("utf-8", "surrogatepass")
    if not header:
        return new
    return struct.pack("<Q", len(new)) + new + data[8 + size :]


def _change(root: Any, rng: random.Random) -> str:
    """Return the text of a JSON value with one of its parts replaced, removed or doubled."""
    places: list[tuple[Any, Any]] = []
    stack = [root] if isinstance(root, dict | list) else []
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not places:
        return json.dumps(rng.choice(_VALUES))
    node, key = rng.choice(places)
    what = rng.choice(("value", "value", "value", "remove", "key", "deep", "long", "twice"))
    if what == "remove":
        del node[key]
    elif what == "key" and isinstance(node, dict):
        node[rng.choice(("", "x", "__class__", "\0", "a" * 999))] = node.pop(key)
    else:
        node[key] = "<here>" if what in ("deep", "long") else rng.choice(_VALUES)
    text = json.dumps(root, ensure_ascii=rng.random() < 0.5)
    if what == "deep":
        return text.replace('"<here>"', "[" * 3000 + "]" * 3000)
    if what == "long":
        return text.replace('"<here>"', _LONG)
    if what == "twice" and text.endswith("}") and len(text) > 2:
        return f"{text[:-1]}, {text[1:]}"
    return text


_KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _truncate,
    _cut,
    _repeat,
    _splice,
    _insert,
    _extreme,
    _json,
    _json,
    _json,
)
