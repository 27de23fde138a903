"""Scratch folders: removed at the end, and by the next process where the end was a kill."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from treeq_export.scratch import remove_abandoned, scratch_folder

HOLDER = """\
import sys, time
from treeq_export.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "weights").write_bytes(bytes(100))
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def make_old(folder: Path) -> None:
    os.utime(folder, (1e9, 1e9))


def test_a_folder_is_empty_but_for_its_lock_and_goes(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == temporary
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / "sub").mkdir()
    assert list(temporary.iterdir()) == []


def test_an_error_removes_it_too(temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder():
        _ = 1 / 0
    assert list(temporary.iterdir()) == []


def test_a_killed_process_leaves_it_for_the_next_to_remove(temporary: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        make_old(folder)
        assert remove_abandoned(temporary) == []  # its process works
        process.kill()
        process.wait()
        assert (folder / "weights").exists()
        with scratch_folder():
            assert not folder.exists()


def test_only_old_folders_of_ours_are_removed(temporary: Path) -> None:
    young, foreign, no_folder = (
        temporary / name for name in ("treeq-scratch-young", "treeq-other", "treeq-scratch-file")
    )
    young.mkdir()
    foreign.mkdir()
    no_folder.write_text("")
    target = temporary / "target"
    target.mkdir()
    link = temporary / "treeq-scratch-link"
    link.symlink_to(target)
    locked_by_link = temporary / "treeq-scratch-trap"
    locked_by_link.mkdir()
    (locked_by_link / ".lock").symlink_to(target / "precious")
    old = temporary / "treeq-scratch-old"
    old.mkdir()
    for path in (foreign, no_folder, locked_by_link, old):
        make_old(path)
    assert remove_abandoned(temporary) == [old]
    assert {path.name for path in temporary.iterdir()} == {
        "treeq-scratch-young",
        "treeq-other",
        "treeq-scratch-file",
        "target",
        "treeq-scratch-link",
        "treeq-scratch-trap",
    }
    assert list(target.iterdir()) == []
