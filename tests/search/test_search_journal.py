"""The journal keeps what it was told: bit for bit, under its fingerprint, and after kill -9."""

import math
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeq_export.errors import OutputError, PlanError
from treeq_export.search.journal import Journal

# Measures 200 values one after the other: a call is logged, then measured, recorded, reported.
SEARCH = """
import sys, time
from pathlib import Path
from treeq_export.search.executor import LocalExecutor, Task, measure_all
from treeq_export.search.journal import Journal

class Worker:
    def measure(self, task):
        for suffix in task.suffixes:
            with open(sys.argv[2], "a") as calls:
                calls.write(f"{task.node} {task.prefix} {suffix}\\n")
            time.sleep(0.001)
            yield (int(task.prefix) + 1) / (int(suffix) + 3)

tasks = [Task("root", str(prefix), tuple(map(str, range(20)))) for prefix in range(10)]
with Journal(Path(sys.argv[1]), "f") as journal, LocalExecutor(Worker) as executor:
    measured = lambda seconds: print(seconds, flush=True)
    values = measure_all(tasks, journal, executor, measured)
print(sum(values.values()).hex())
"""
NUM_VALUES = 200


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "journal.sqlite"


def record_some(path: Path, num_values: int = 1) -> None:
    with Journal(path, "f") as journal:
        for index in range(num_values):
            journal.record("root", "left", f"{index:04}", index / 7, 0.5)


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def test_finds_what_was_recorded_under_node_and_prefix(path: Path) -> None:
    with Journal(path, "f") as journal:
        assert journal.lookup("root", "left") == {}
        journal.record("root", "left", "b", 0.1, 1.5)
        journal.record("root", "left", "a", 0.2, 1.5)
        journal.record("root", "", "a", 0.3, 1.5)
        journal.record("leaf", "left", "a", 0.4, 1.5)
        assert list(journal.lookup("root", "left").items()) == [("a", 0.2), ("b", 0.1)]
    with Journal(path, "f") as journal:
        assert journal.lookup("root", "left") == {"a": 0.2, "b": 0.1}
        assert journal.lookup("root", "") == {"a": 0.3}
        assert journal.lookup("leaf", "left") == {"a": 0.4}


def test_another_fingerprint_finds_nothing_and_takes_nothing_away(path: Path) -> None:
    record_some(path)
    with Journal(path, "g") as journal:
        assert journal.lookup("root", "left") == {}
        journal.record("root", "left", "0000", 5.0, 0.5)
        assert journal.lookup("root", "left") == {"0000": 5.0}
    with Journal(path, "f") as journal:
        assert journal.lookup("root", "left") == {"0000": 0.0}


def test_first_value_of_a_key_stays(path: Path) -> None:
    with Journal(path, "f") as journal:
        journal.record("root", "left", "a", 0.1, 1.0)
        journal.record("root", "left", "a", 0.2, 1.0)
        assert journal.lookup("root", "left") == {"a": 0.1}


def test_every_number_comes_back_bit_for_bit(path: Path) -> None:
    with Journal(path, "f") as journal:

        @settings(deadline=None, max_examples=50)
        @given(value=st.floats(allow_nan=False), name=st.text("aB/:'\"\0\né", max_size=4))
        def check(value: float, name: str) -> None:
            journal.record(name, name, value.hex(), value, 0.0)
            assert bits(journal.lookup(name, name)[value.hex()]) == bits(value)

        check()
        for value in (0.0, -0.0, math.inf, -math.inf, 5e-324):
            journal.record("special", "", value.hex(), value, 0.0)
            assert bits(journal.lookup("special", "")[value.hex()]) == bits(value)
        journal.record("special", "", "nan", math.nan, 0.0)
        assert math.isnan(journal.lookup("special", "")["nan"])


def test_touches_nothing_before_it_is_entered(path: Path) -> None:
    journal = Journal(path, "f")
    assert not path.parent.exists()
    with pytest.raises(RuntimeError, match=r"the journal is closed; use it in a with statement"):
        journal.lookup("root", "")


def test_closed_journal_is_one_file(path: Path) -> None:
    record_some(path, 3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_second_owner_is_refused_until_the_first_is_gone(path: Path) -> None:
    with (
        Journal(path, "f"),
        pytest.raises(OutputError, match=r"another process has this search journal open\. Wait"),
        Journal(path, "f", busy_timeout_s=0.05),
    ):
        pass
    record_some(path)


def record_after_damage(path: Path) -> list[str]:
    """Open a damaged journal and record in it; return what was said."""
    said: list[str] = []
    with Journal(path, "f", say=said.append) as journal:
        journal.record("root", "left", "new", 2.5, 0.5)
        assert journal.lookup("root", "left")["new"] == 2.5
    assert all("\n" not in line for line in said)
    return said


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(4096)])
def test_file_that_is_no_database_is_moved_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    (line,) = record_after_damage(path)
    assert "journal.sqlite: the search journal is damaged (" in line
    assert "moved to journal.damaged.sqlite" in line
    assert path.with_name("journal.damaged.sqlite").read_bytes() == content
    assert record_after_damage(path) == []


def test_database_of_somebody_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE evaluations (number)")
    database.close()
    content = path.read_bytes()
    with pytest.raises(PlanError, match=r"not a search journal of this version.*Remove the file"):
        record_some(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(("version", "refused"), [(1, False), (3, True)])
def test_other_formats(path: Path, version: int, refused: bool) -> None:
    record_some(path)
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {version}")
    database.close()
    if refused:
        with pytest.raises(PlanError, match="not a search journal of this version"):
            record_some(path)
    else:
        (line,) = record_after_damage(path)
        assert "a search journal of an older treeq-export" in line


def test_truncated_journal(path: Path) -> None:
    record_some(path, 1000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (line,) = record_after_damage(path)
    assert "journal.sqlite: the search journal is damaged" in line


def test_overwritten_page(path: Path) -> None:
    record_some(path, 1000)
    content = bytearray(path.read_bytes())
    page = content.rindex(b"\n", 0, len(content) - 4096) // 4096 * 4096
    content[page : page + 4096] = bytes(4096)
    path.write_bytes(content)
    (line,) = record_after_damage(path)
    assert "the search journal is damaged" in line


@pytest.mark.parametrize("change", ["value = 'much'", "value = '0.25'", "suffix = '0009'"])
def test_changed_row_is_dropped(path: Path, change: str) -> None:
    record_some(path, 3)
    database = sqlite3.connect(path)
    with database:
        database.execute(f"UPDATE evaluations SET {change} WHERE suffix = '0001'")
    database.close()
    (line,) = record_after_damage(path)
    assert "journal.sqlite: 1 of 3 values are damaged; they are measured again." in line
    with Journal(path, "f") as journal:
        assert journal.lookup("root", "left") == {"0000": 0.0, "0002": 2 / 7, "new": 2.5}


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_never_changes_a_value(path: Path, seed: int) -> None:
    random = Random(seed)
    record_some(path, 150)
    content = bytearray(path.read_bytes())
    used = [at for at, byte in enumerate(content) if byte]
    for _ in range(random.choice((1, 4))):
        content[random.choice(used)] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    found: dict[str, float] = {}
    with suppress(PlanError), Journal(path, "f") as journal:  # refused as somebody else's
        found = journal.lookup("root", "left")
    assert found.items() <= {f"{index:04}": index / 7 for index in range(150)}.items()


def test_removed_journal_starts_again_beside_its_stale_log(path: Path) -> None:
    record_some(path)
    path.rename(path.with_name("journal.sqlite-wal"))
    with Journal(path, "f") as journal:
        assert journal.lookup("root", "left") == {}


def test_file_left_empty_by_a_kill_is_new(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    record_some(path)


def test_folder_in_the_way(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"journal\.sqlite: cannot be read or written .*--out"):
        record_some(path)


def test_full_disk(path: Path) -> None:
    with Journal(path, "f") as journal:
        journal._open_database.execute("PRAGMA max_page_count = 4")
        journal.record("root", "left", "a", 0.1, 0.1)
        with pytest.raises(OutputError, match=r"database or disk is full.*Free some space"):
            journal.record("root", "left", "a" * 100_000, 0.1, 0.1)
        assert journal.lookup("root", "left") == {"a": 0.1}
    record_some(path)


def search_in_child(path: Path, calls: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, str(path), str(calls)], stdout=subprocess.PIPE, text=True
    )


def read_recorded(path: Path) -> set[str]:
    with Journal(path, "f") as journal:
        return {
            f"root {prefix} {suffix}"
            for prefix in range(10)
            for suffix in journal.lookup("root", str(prefix))
        }


@pytest.mark.parametrize("seed", range(3))
def test_kill_loses_nothing_reported_and_nothing_recorded_is_measured_again(
    path: Path, seed: int
) -> None:
    random = Random(seed)
    calls = path.with_name("calls")
    path.parent.mkdir()
    allowed: Counter[str] = Counter()
    recorded: set[str] = set()
    for _ in range(3):
        child = search_in_child(path, calls)
        assert child.stdout is not None
        num_reported = random.randrange(1, NUM_VALUES // 4) + len(recorded)
        for _ in range(num_reported):
            assert child.stdout.readline()
        time.sleep(random.random() * 0.01)
        child.kill()
        output, _ = child.communicate()
        assert child.returncode == -9
        recorded = read_recorded(path)
        assert num_reported + len(output.splitlines()) <= len(recorded)
        measured = Counter(calls.read_text().splitlines())
        in_flight = set(measured) - recorded
        assert len(in_flight) <= 1
        allowed.update(in_flight)
    output, _ = search_in_child(path, calls).communicate()
    *reports, total = output.split()
    assert float.fromhex(total) == sum((p + 1) / (s + 3) for p in range(10) for s in range(20))
    assert len(reports) == NUM_VALUES
    assert reports.count("None") == len(recorded)
    assert Counter(calls.read_text().splitlines()) == Counter(read_recorded(path)) + allowed
