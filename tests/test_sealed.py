"""Sealed files: content comes back, any flipped byte is noticed and said in one line."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treeq_export.sealed import (
    is_sealed,
    read_sealed_json,
    read_sealed_metadata,
    seal,
    write_sealed_json,
    write_sealed_tensors,
)

TENSORS = {"a": np.arange(40, dtype=np.float32), "b": np.zeros((2, 3), np.int8)}
VALUE = {"depends": "x", "numbers": [1, 2.5, None], "more": {"é": True}}


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "a.safetensors"
    write_sealed_tensors(path, save_file, TENSORS, "f", other="o")
    return path


def test_tensors_and_metadata_come_back(tensors: Path) -> None:
    said: list[str] = []
    metadata = read_sealed_metadata(tensors, "f", said.append)
    assert metadata is not None
    assert (metadata["fingerprint"], metadata["other"]) == ("f", "o")
    loaded = load_file(tensors)
    assert {name: array.tolist() for name, array in loaded.items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    assert said == []


def test_a_missing_file_and_one_of_another_label_are_no_damage(tensors: Path) -> None:
    said: list[str] = []
    assert read_sealed_metadata(tensors, "g", said.append) is None
    assert read_sealed_metadata(tensors.with_name("b"), "g", said.append) is None
    assert said == []


def test_every_flipped_bit_of_a_tensor_file_is_noticed(tensors: Path) -> None:
    content, random = tensors.read_bytes(), Random(0)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << random.randrange(8)
        tensors.write_bytes(damaged)
        said: list[str] = []
        assert read_sealed_metadata(tensors, "f", said.append) is None, at
        assert said == [f"{tensors}: damaged, or of an older treeq-export; it is made again."]


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_tensor_file_is_damage(tensors: Path, content: bytes) -> None:
    tensors.write_bytes(content)
    said: list[str] = []
    assert read_sealed_metadata(tensors, "f", said.append) is None
    assert len(said) == 1


def test_a_file_without_a_seal_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_file(TENSORS, path, metadata={"fingerprint": "f"})
    said: list[str] = []
    assert read_sealed_metadata(path, "f", said.append) is None
    assert len(said) == 1


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, VALUE)
    assert read_sealed_json(path) == VALUE
    assert is_sealed(json.loads(path.read_text()))
    assert seal(seal(VALUE)) == seal(VALUE)
    assert read_sealed_json(tmp_path / "none.json") is None


def test_a_flipped_bit_of_json_changes_nothing_or_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, VALUE)
    content, random = path.read_bytes(), Random(0)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        said: list[str] = []
        found = read_sealed_json(path, said.append)
        assert found == VALUE if not said else found is None, at  # white space may have changed
