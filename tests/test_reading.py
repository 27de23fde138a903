"""One line per fault, the caller's class and remedy, and limits that hold for every reader."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.numpy import save_file

from treeq_export.errors import PlanError, TreeqError
from treeq_export.reading import (
    load_safetensors,
    open_safetensors,
    parse_json,
    parse_record,
    parse_yaml,
    read_bytes,
    read_json,
    read_object,
    read_record,
    read_text,
    read_yaml,
)
from treeq_export.reading.limits import MAX_DEPTH, MAX_YAML_BYTES

FAULTS: dict[str, Any] = {"error": PlanError, "remedy": "Write it again."}


class Point(BaseModel):
    x: int
    name: str = ""


def _json(data: bytes | str) -> Any:
    return parse_json(data, "x.json", **FAULTS)


def _yaml(text: str) -> Any:
    return parse_yaml(text, "x.yaml", **FAULTS)


def _line(path: Path, *, reader: Any = read_bytes, **options: Any) -> str:
    """Return the one line that a reader ends with."""
    with pytest.raises(PlanError) as caught:
        reader(path, **FAULTS, **options)
    line = str(caught.value)
    assert line.endswith("Write it again.")
    assert "\n" not in line
    return line


def _ending(parse: Callable[[Any], Any], text: bytes | str) -> str:
    """Return the error of a text, or that it was a value."""
    try:
        return f"x.{parse.__name__[1:]}: {parse(text)}"
    except PlanError as error:
        return str(error)


# Files --------------------------------------------------------------------------------------------


def test_bytes_and_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes("\ufeffgrün".encode())
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link", **FAULTS) == "\ufeffgrün".encode()
    assert read_text(path, **FAULTS) == "grün"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert (
        _line(tmp_path / "none")
        == f"{tmp_path}/none: cannot be read (No such file or directory). Write it again."
    )
    assert "cannot be read (Is a directory)" in _line(tmp_path)
    assert "not a regular file" in _line(tmp_path / "pipe")  # would wait for ever
    assert "not a regular file" in _line(Path("/dev/zero"))  # never ends
    assert "not the name of a file" in _line(tmp_path / "a\0b")
    assert "cannot be read" in _line(tmp_path / ("a" * 300))
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert "cannot be read" in _line(tmp_path / "ring")
    (tmp_path / "file").touch()
    assert "cannot be read" in _line(tmp_path / "file" / "below")


def test_size_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"ab\xff")
    assert read_bytes(path, **FAULTS, max_bytes=3) == b"ab\xff"
    assert "larger than 2 bytes" in _line(path, max_bytes=2)
    assert "not UTF-8 at byte 2" in _line(path, reader=read_text)


def test_a_pipe_stands_for_a_recipe() -> None:
    end, start = os.pipe()
    os.write(start, b"a: 1")
    os.close(start)
    try:
        assert read_yaml(Path(f"/dev/fd/{end}"), **FAULTS) == {"a": 1}
    finally:
        os.close(end)


# JSON ---------------------------------------------------------------------------------------------

_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 64)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(_PLAIN, st.booleans())
def test_json_of_anything(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert _json(text) == value
    assert _json(text.encode()) == value


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_json_of_noise_is_a_value_or_one_line(data: bytes) -> None:
    assert _ending(_json, data).startswith("x.json: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": ', "not JSON (Expecting value: line 1 column 7 (char 6))"),
        (b"", "not JSON (Expecting value"),
        (b"\xff\xfe{\x00}\x00", "not JSON (not UTF-8 at byte 0)"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "more than 64 levels deep"),
        ("[" * 100_000, "more than 64 levels deep"),
        ('{"a":' * 100_000, "more than 64 levels deep"),
        ("9" * 41, "a number of 41 characters (999999999999...), expected at most 40"),
        ("-" + "9" * 5000, "a number of 5001 characters"),
        ("0." + "1" * 100_000, "a number of 100002 characters"),
        ("[" + "[],{}," * 1_000_001 + "0]", "more than 4000000 values"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "key 'b' stands twice in one mapping"),
        (r'["a\u0000b"]', r"'a\x00b': holds a NUL"),
        (r'{"a\u0000": 1}', r"'a\x00': holds a NUL"),
        (r'["\ud800"]', r"'\ud800': holds a NUL or half of a character"),
    ],
)
def test_json_beyond_a_limit(text: bytes | str, problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        _json(text)
    assert str(caught.value).startswith(f"x.json: {problem}")
    assert str(caught.value).endswith(". Write it again.")


def test_json_at_its_limits() -> None:
    deep = _json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (deep,) = deep
    assert deep == []
    assert _json("9" * 40) == int("9" * 40)
    assert _json("[NaN, Infinity]")[1] == float("inf")
    assert _json(r'"\ud83d\ude00"') == "\U0001f600"


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"x": 1}]')
    assert read_json(path, **FAULTS) == [{"x": 1}]
    assert f"{path}: received a list, expected an object" in _line(path, reader=read_object)
    path.write_text('{"x": 1}')
    assert read_object(path, **FAULTS) == {"x": 1}
    assert read_record(path, Point, **FAULTS) == Point(x=1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "the whole: Input should be an object (received [])."),
        ("{}", "x: Field required (received {})."),
        (
            '{"x": "y"}',
            "x: Input should be a valid integer, unable to parse",
        ),
        ('{"x": 1, "name": "a\\nb"}', ""),
        ('{"x": 1, "x": 1}', "key 'x' stands twice"),
        ("[" * 100_000, "more than 64 levels deep"),
    ],
)
def test_records(text: str, problem: str) -> None:
    if not problem:
        assert parse_record(text, Point, "r.json", **FAULTS).name == "a\nb"
        return
    with pytest.raises(PlanError) as caught:
        parse_record(text.encode(), Point, "r.json", **FAULTS)
    assert str(caught.value).startswith(f"r.json: {problem}")


# YAML ---------------------------------------------------------------------------------------------


def test_yaml_values() -> None:
    assert _yaml("a: [1, 2.5, yes, null, 1_000]\nb: &x {c: d}\ne: *x") == {
        "a": [1, 2.5, True, None, 1000],
        "b": {"c": "d"},
        "e": {"c": "d"},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "not YAML: line 1, column 6: "),
        ("a: b: c", "not YAML: line 1, column 5: mapping values are not allowed here"),
        ("a: 2024-13-45", "not YAML: line 1, column 4: '2024-13-45' is no timestamp; quote it"),
        ("a: !!int x", "not YAML: line 1, column 4: 'x' is no int; quote it"),
        ("a: !!float x", "not YAML: line 1, column 4: 'x' is no float; quote it"),
        ("a: !!bool maybe", "not YAML: line 1, column 4: 'maybe' is no bool; quote it"),
        ("a: !!timestamp x", "not YAML: line 1, column 4: 'x' is no timestamp; quote it"),
        ("a: !!int ''", "not YAML: line 1, column 4: '' is no int; quote it"),
        ("a: !!python/object:os.system x", "not YAML: line 1, column 4: could not determine"),
        ("a: 2024-01-02", "2024-01-02: a date, expected a text or a number; quote it"),
        ("a: !!binary aGk=", "b'hi': a bytes, expected"),
        ("a: !!set {x}", "{'x'}: a set, expected"),
        ("on: 1", "key True: a bool, expected a text; quote it"),
        ("3: 1", "key 3: a int, expected a text; quote it"),
        ("[a]: 1", "not YAML: line 1, column 1: found unhashable key"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("a: " + "1:" * 5000 + "1", "a number of 10001 characters"),
        ("a: 1." + "9" * 5000, "a number of 5002 characters"),
        ('a: "b\\0c"', r"'b\x00c': holds a NUL"),
        ('a: "\\uD800"', r"'\ud800': holds a NUL or half"),
        ('a: "\\UFFFFFFFF"', "not YAML: "),
        ("a: \x1b[31m", "not YAML: "),
        ("[" * 2000, "more than 64 levels deep"),
        ("- " * 2000 + "a", "more than 64 levels deep"),
        ("{a: " * 2000, "more than 64 levels deep"),
        ("&x [*x]", "more than 64 levels deep"),
        ("a: &a {<<: *a}", "not YAML: line 1, column 8: received a merge (<<)"),
        ("a: 1\nb: 2\na: 3", "not YAML: line 3, column 1: key 'a' stands twice"),
        ("a: " + "b" * MAX_YAML_BYTES, "larger than 262144 bytes"),
        ("[" + ",".join("a" * 24_000) + "]", "more than 20000 values"),
        (
            "\n".join(
                f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]" for i in range(12)
            ),
            "more than 20000 values",
        ),
        ("\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 1}]" for i in range(99)), "more than 64"),
    ],
)
def test_yaml_beyond_a_limit(text: str, problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        _yaml(text)
    assert str(caught.value).startswith(f"x.yaml: {problem}")
    assert str(caught.value).endswith(". Write it again.")
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.text("ab:-[]{}&*!<>?|'\"\\ \n#%@,01.eE_~", max_size=40))
def test_yaml_of_noise_is_a_value_or_one_line(text: str) -> None:
    assert _ending(_yaml, text).startswith("x.yaml: ")


# Safetensors --------------------------------------------------------------------------------------


def _with_header(path: Path, header: Any, data: bytes = bytes(8), size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.int8)}
    save_file(tensors, path, metadata={"key": "value"})
    with open_safetensors(path, **FAULTS) as file:
        assert sorted(file.header) == ["a", "b"]
        assert file.metadata == {"key": "value"}
        assert file.shape("a") == (2, 3)
        assert np.array_equal(file.get("a"), tensors["a"])
        with pytest.raises(PlanError, match=r"c: missing\. Write it again\."):
            file.get("c")
    loaded = load_safetensors(path, **FAULTS)
    assert loaded["b"].shape == (0,)
    loaded["a"] += 1  # its own copy
    assert load_safetensors(path, **FAULTS, framework="pt")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_damaged_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def line(header: Any, **options: Any) -> str:
        return _line(_with_header(path, header, **options), reader=load_safetensors)

    assert (
        "12 bytes that are no complete safetensors file (its header would take 9223372036854775808)"
        in line(b"", data=bytes(4), size=1 << 63)
    )
    assert "would take 0)" in line(b"")
    assert "would take 100)" in line({"a": _entry()}, size=100)
    assert "header: not JSON (" in line(b"{]")
    assert "header: received a list" in line([])
    assert "header: more than 64 levels deep" in line(b"[" * 100_000)
    assert "header: a number of 5000 characters" in line(b"9" * 5000)
    twice = json.dumps({"a": _entry()})[:-1] + "," + json.dumps({"a": _entry()})[1:]
    assert "header: key 'a' stands twice" in line(twice.encode())
    for changes in (
        {"dtype": "F31"},
        {"shape": [3]},
        {"shape": [1 << 63, 1 << 63]},
        {"shape": "x"},
        {"data_offsets": [0, 1 << 60]},
        {"data_offsets": [8, 0]},
        {"data_offsets": None},
    ):
        assert "that are no complete safetensors file" in line({"a": _entry(**changes)})
    assert "bytes that are no complete" in line({"a": 1})
    assert "bytes that are no complete" in line({"a": _entry()}, data=bytes(7))
    assert "bytes that are no complete" in line({"__metadata__": {"a": 1}, "a": _entry()})
    path.write_bytes(b"abc")
    assert "3 bytes that are no complete" in _line(path, reader=load_safetensors)
    assert "No such file" in _line(tmp_path / "none", reader=load_safetensors)
    assert "Is a directory" in _line(tmp_path, reader=load_safetensors)


def test_a_type_that_numpy_lacks(tmp_path: Path) -> None:
    path = _with_header(tmp_path / "a", {"a": _entry(dtype="F8_E5M2", shape=[8])})
    assert "a (F8_E5M2): cannot be read" in _line(path, reader=load_safetensors)


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 200))
def test_tensors_of_noise(tmp_path_factory: pytest.TempPathFactory, data: bytes, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(struct.pack("<Q", size) + data)
    with pytest.raises(TreeqError, match="Write it again"):
        load_safetensors(path, **FAULTS)
