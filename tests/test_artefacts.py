"""Files appear as a whole or not at all."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from safetensors import SafetensorError

from treeq_export import artefacts
from treeq_export.artefacts import (
    atomic_folder,
    atomic_path,
    make_folder,
    remove_stale,
    sha256_of_file,
    write_bytes,
    write_json,
)
from treeq_export.errors import CheckpointError, OutputError, TreeqError

FAILURES = [ValueError("own"), KeyboardInterrupt(), SystemExit(3), CheckpointError("own")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_raise(path: Path, failure: BaseException) -> None:
    path.write_bytes(b"half")
    raise failure


def write_to_full_device(path: Path) -> None:
    path.symlink_to("/dev/full")
    path.write_bytes(b"x")


# atomic_path ------------------------------------------------------------------------------------


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "plan.json"
    for text in ("first", "second"):
        with atomic_path(path) as temporary:
            assert not temporary.exists()
            assert temporary.parent.parent == path.parent
            assert temporary.name == path.name
            temporary.write_text(text)
            assert path.exists() == (text == "second")
        assert path.read_text() == text
    assert names(path.parent) == ["plan.json"]


def test_anyone_may_read_the_file(tmp_path: Path):
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.touch(mode=0o600)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o644


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failing_block_leaves_the_old_file(failure: BaseException, tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, atomic_path(path) as temporary:
        write_and_raise(temporary, failure)
    assert caught.value is failure
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path):
    with (
        pytest.raises(OutputError, match=r"a\.bin: cannot be written"),
        atomic_path(tmp_path / "a.bin"),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full ("),
        (errno.EDQUOT, "the disk quota is used up. Free some space or choose another --out"),
        (errno.EFBIG, "larger than `ulimit -f` or the file system allows. Raise the limit or"),
        (errno.EROFS, "cannot be written (Read-only file system). Choose another --out folder."),
        (errno.EACCES, "cannot be written (Permission denied). Choose another --out folder."),
    ],
)
@pytest.mark.parametrize("writer", ["python", "rust"])
def test_a_failed_write_is_one_line(code: int, message: str, writer: str, tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    failure = OSError(code, os.strerror(code))
    if writer == "rust":  # how safetensors words it
        failure = SafetensorError(f"Error while serializing: I/O error: x (os error {code})")
    with pytest.raises(OutputError) as caught, atomic_path(path) as temporary:
        write_and_raise(temporary, failure)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is failure
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_really_full_device(tmp_path: Path):
    path = tmp_path / "a.bin"
    with (
        pytest.raises(OutputError, match=r"the disk is full \(\d+\.\d MB free\)"),
        atomic_path(path) as temporary,
    ):
        write_to_full_device(temporary)
    assert names(tmp_path) == []


def test_an_error_without_a_number_keeps_its_text(tmp_path: Path):
    with (
        pytest.raises(OutputError, match=r"cannot be written \(special file\)"),
        atomic_path(tmp_path / "a.bin"),
    ):
        raise OSError("special file")


def test_other_errors_of_rust_libraries_pass(tmp_path: Path):
    with pytest.raises(SafetensorError, match="InvalidHeader"), atomic_path(tmp_path / "a.bin"):
        raise SafetensorError("InvalidHeader")


def test_own_errors_pass_even_if_they_quote_one(tmp_path: Path):
    text = "model.safetensors: No such file or directory (os error 2)"
    with pytest.raises(CheckpointError) as caught, atomic_path(tmp_path / "a.bin"):
        raise CheckpointError(text)
    assert str(caught.value) == text


@pytest.mark.parametrize("below", ["x.json", "deep/er/x.json"])
def test_a_folder_that_cannot_be_made(below: str, tmp_path: Path):
    (tmp_path / "file").write_text("old")
    path = tmp_path / "file" / below
    entered = False
    with pytest.raises(OutputError) as caught, atomic_path(path):
        entered = True
    assert not entered
    assert str(caught.value).startswith(f"{path}: cannot be written (")
    assert str(caught.value).endswith("). Choose another --out folder.")
    assert (tmp_path / "file").read_text() == "old"


def test_a_file_larger_than_the_limit(tmp_path: Path):
    """Real failures of Python's and of Rust's writer, in a process with RLIMIT_FSIZE."""
    script = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from safetensors.numpy import save_file
        from treeq_export.artefacts import atomic_path, write_bytes
        from treeq_export.errors import OutputError

        folder = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        def rust():
            with atomic_path(folder / "rust.safetensors") as temporary:
                save_file({"a": np.zeros(10000)}, temporary)
        for function in (rust, lambda: write_bytes(folder / "python.bin", bytes(80000))):
            try:
                function()
            except OutputError as error:
                print(error)
        write_bytes(folder / "small.bin", bytes(4000))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "larger than `ulimit -f` or the file system allows. Raise the limit or choose"
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'rust.safetensors'}: {reason}")
    assert lines[1].startswith(f"{tmp_path / 'python.bin'}: {reason}")
    assert names(tmp_path) == ["small.bin"]


# atomic_folder ----------------------------------------------------------------------------------


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "onnx" / "ort"
    with atomic_folder(path) as temporary:
        (temporary / "model.onnx").write_text("first")
        (temporary / "model.onnx.data").write_text("first")
        assert not path.exists()
    with atomic_folder(path) as temporary:
        assert names(temporary) == []
        (temporary / "model.onnx").write_text("second")
        assert names(path) == ["model.onnx", "model.onnx.data"]
    assert names(path) == ["model.onnx"]
    assert (path / "model.onnx").read_text() == "second"
    assert names(tmp_path / "onnx") == ["ort"]


def test_the_old_folder_is_never_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ort"
    make_folder(path)
    (path / "old").touch()
    rmtree, removed = shutil.rmtree, []

    def remove(folder: Path, **options: bool) -> None:
        assert folder != path
        removed.append((names(folder / "ort"), names(path)))
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert removed == [(["old"], ["new"])]
    assert names(tmp_path) == ["ort"]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failing_block_leaves_the_old_folder(failure: BaseException, tmp_path: Path):
    path = tmp_path / "ort"
    make_folder(path)
    (path / "model.onnx").write_text("old")
    with pytest.raises(type(failure)) as caught, atomic_folder(path) as temporary:
        write_and_raise(temporary / "model.onnx", failure)
    assert caught.value is failure
    assert names(tmp_path) == ["ort"]
    assert (path / "model.onnx").read_text() == "old"


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path):
    path = tmp_path / "ort"
    make_folder(path)
    with (
        pytest.raises(OutputError, match=r"ort: the disk is full \("),
        atomic_folder(path) as temporary,
    ):
        write_to_full_device(temporary / "model.onnx")
    assert names(tmp_path) == ["ort"]


def test_what_is_not_ours_is_kept(tmp_path: Path):
    path = tmp_path / "ort"
    (path / "profiles" / "deep").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "notes.txt", "profiles/deep/a.json"):
        (path / name).write_text(f"old {name}")
    (path / "link").symlink_to("notes.txt")
    with atomic_folder(path, ("model.onnx", "model.onnx.data")) as temporary:
        (temporary / "model.onnx").write_text("new")
    assert names(path) == ["link", "model.onnx", "notes.txt", "profiles"]
    assert (path / "model.onnx").read_text() == "new"
    assert (path / "notes.txt").read_text() == "old notes.txt"
    assert (path / "link").readlink() == Path("notes.txt")
    assert (path / "profiles" / "deep" / "a.json").read_text() == "old profiles/deep/a.json"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path):
    path = tmp_path / "ort"
    path.write_text("mine")
    with pytest.raises(OutputError, match="ort: is a file, expected a folder"), atomic_folder(path):
        pass
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["ort"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_is_replaced_and_its_target_is_not_written(kind: str, tmp_path: Path):
    target, path = tmp_path / "target", tmp_path / "out" / "ort"
    path.parent.mkdir()
    path.symlink_to(target)
    if kind == "file":
        target.write_text("mine")
        write_bytes(path, b"new")
        assert (target.read_text(), path.read_text()) == ("mine", "new")
    else:
        target.mkdir()
        (target / "mine").touch()
        with atomic_folder(path) as temporary:
            (temporary / "new").touch()
        assert (names(target), names(path)) == (["mine"], ["new"])
    assert not path.is_symlink()
    assert names(path.parent) == ["ort"]


def kill_after(run: Path, renames: int, *, exchange: bool) -> int:
    """Replace run/ort in a process that is killed after so many renamings; return its status."""
    script = """
        import os, sys
        from pathlib import Path
        from treeq_export import artefacts

        run, left, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
        swap, replace = artefacts._exchange, Path.replace

        def count(rename, *paths):
            global left
            if left == 0:
                os._exit(9)
            left -= 1
            return rename(*paths)

        artefacts._exchange = lambda *paths: exchange and count(swap, *paths)
        Path.replace = lambda *paths: count(replace, *paths)
        with artefacts.atomic_folder(run / "ort") as folder:
            (folder / "new").touch()
            (folder / "more").touch()
        os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), run, str(renames), str(exchange)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize(
    ("exchange", "renames", "between"),
    [
        (True, 0, ["old"]),
        (True, 1, None),
        (False, 0, ["old"]),
        (False, 1, []),
        (False, 2, None),
    ],
)
def test_a_kill_between_two_renamings_loses_nothing(
    exchange: bool, renames: int, between: list[str] | None, tmp_path: Path
):
    path = tmp_path / "ort"
    path.mkdir()
    (path / "old").touch()
    status = kill_after(tmp_path, renames, exchange=exchange)
    if between is None:  # that was the last renaming
        assert status == 0
        assert names(path) == ["more", "new"]
        return
    assert status == 9
    assert (names(path) if path.exists() else []) == between
    write_bytes(tmp_path / "other", b"x")  # any write of ours into the same folder
    assert names(path) == ["old"]
    assert names(tmp_path) == ["ort", "other"]


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"file/ort: cannot be written \("),
        atomic_folder(tmp_path / "file" / "ort"),
    ):
        pass
    assert names(tmp_path) == ["file"]


# The rest ---------------------------------------------------------------------------------------


def test_make_folder(tmp_path: Path):
    path = tmp_path / "a" / "b"
    assert make_folder(path) == path
    assert make_folder(path) == path
    assert names(path) == []


def test_make_folder_below_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OutputError) as caught:
            make_folder(path)
        assert str(caught.value).startswith(f"{path}: cannot be written (")
        assert "Choose another --out" in str(caught.value)


def test_make_folder_notices_that_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        make_folder(tmp_path / "a")


def test_write_json_is_indented_and_ends_in_a_newline(tmp_path: Path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    assert (tmp_path / "a.json").read_bytes() == (
        b'{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": null\n}\n'
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5], "a": None}


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_bytes() == b"1\n"
    assert names(tmp_path) == ["a.json"]


def test_write_bytes(tmp_path: Path):
    write_bytes(tmp_path / "a.bin", b"\x00\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"


KILLED = """
    import os, sys, time
    from pathlib import Path
    from treeq_export.artefacts import atomic_folder, atomic_path

    run = Path(sys.argv[1])
    with atomic_path(run / "plan.json") as file, atomic_folder(run / "onnx" / "ort") as folder:
        file.write_text("half")
        (folder / "model.onnx").write_text("half")
        print(flush=True)
        time.sleep(60)
"""


def start_writer(run: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(run)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"\n"
    writer.stdout.close()
    return writer


def test_remove_stale_takes_what_killed_processes_left_and_nothing_else(tmp_path: Path):
    """The names are taken from a process that is killed in the middle of both blocks."""
    write_bytes(tmp_path / "plan.json", b"old")
    write_bytes(tmp_path / "onnx" / "ort" / "model.onnx", b"old")
    for name in (".hidden", "part.partial", ".movie.mkv.partial", ".treeq-1-abc.partial"):
        write_bytes(tmp_path / name, b"kept")
    for name in (".git.partial", ".treeq-x.partial"):
        (tmp_path / name).mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".treeq-1-linked.partial").symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    writer = start_writer(tmp_path)
    left = [path for path in set(tmp_path.rglob("*")) - set(before) if path.is_dir()]
    folders = sorted(path for path in left if path.name.startswith(f".treeq-{writer.pid}-"))
    assert [path.parent for path in folders] == [tmp_path, tmp_path / "onnx"]
    assert remove_stale(tmp_path) == []  # it is at work
    assert all(path.is_dir() for path in folders)
    writer.kill()
    writer.wait()
    assert remove_stale(tmp_path) == folders[:1]  # not in folders below
    assert folders[1].is_dir()
    write_bytes(tmp_path / "onnx" / "other", b"")
    (tmp_path / "onnx" / "other").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "plan.json").read_bytes() == b"old"


def test_temporaries_of_this_process_are_no_stale_ones(tmp_path: Path):
    with atomic_path(tmp_path / "one") as one:
        one.write_text("1")
        write_bytes(tmp_path / "two", b"2")
        assert remove_stale(tmp_path) == []
    assert names(tmp_path) == ["one", "two"]


def test_nothing_is_removed_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stale = tmp_path / ".treeq-1-abcdefgh.partial"
    stale.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        write_bytes(tmp_path / "a", b"x")
        assert names(tmp_path) == [stale.name, "a"]
    assert remove_stale(tmp_path) == [stale]


def test_what_cannot_go_back_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replaced = tmp_path / ".treeq-1-abcdefgh.partial" / ".replaced" / "old"
    replaced.mkdir(parents=True)

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        assert remove_stale(tmp_path) == []
    assert replaced.is_dir()
    assert remove_stale(tmp_path) == [replaced.parents[1]]
    assert names(tmp_path) == ["old"]


def test_remove_stale_of_no_folder(tmp_path: Path):
    assert remove_stale(tmp_path / "nothing") == []


def test_sha256_of_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_output_errors_end_with_status_1():
    assert issubclass(OutputError, TreeqError)
    assert OutputError.exit_status == 1


def test_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    final = tmp_path / "onnx"
    final.mkdir()
    (final / "model").write_text("old")
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == final and self.parent.name != ".replaced":
            raise OSError(errno.EACCES, "refused")
        return replace(self, target)

    monkeypatch.setattr(artefacts, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="onnx"), atomic_folder(final) as folder:
        (folder / "model").write_text("new")
    assert (final / "model").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
