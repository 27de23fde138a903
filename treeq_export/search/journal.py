"""The evaluation journal: every value that a search has measured, in one SQLite file.

A search asks the journal before it measures and tells it at once what it has measured, so a search
that is killed and started again goes on where it was. A journal may hold several searches: values
are found under the fingerprint of everything that they depend on and under no other. It is no
sealed file (sealed.py), because values come one at a time and by the thousand.

The file is in WAL mode with `synchronous=NORMAL`, one transaction per value. A recorded value is
with the operating system when `record` returns: `kill -9` loses none. A power failure may lose the
last ones, never the file: they are measured again. The process that opened the journal owns it
alone, and the kernel frees it when that process dies.

Every row carries a digest of its content. A damaged row is dropped, and a damaged file is moved
aside, when the journal is opened; what they held is measured again.

A value is stored as the shortest decimal text that reads back as the same number, since SQLite's
REAL turns NaN into NULL and -0.0 into 0.0.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from treeq_export.artefacts import make_folder
from treeq_export.errors import OutputError, PlanError
from treeq_export.progress import Say, say_nothing

BUSY_TIMEOUT_S = 5.0  # a killed owner needs a moment until it is gone
_APPLICATION_ID = 0x54524551  # "TREQ", in the header of the file
_FORMAT_VERSION = 2
_OWNED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_NOT_WRITABLE = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
)

_CREATE = f"""
BEGIN IMMEDIATE;
CREATE TABLE evaluations (
    fingerprint TEXT NOT NULL,
    node TEXT NOT NULL,
    prefix TEXT NOT NULL,
    suffix TEXT NOT NULL,
    value TEXT NOT NULL,
    seconds REAL NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (fingerprint, node, prefix, suffix)
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT_VERSION};
COMMIT;
"""


class _DamagedError(PlanError):
    """The journal, or one of an older version, is of no more use."""


class Journal:
    """The values measured under one fingerprint. Use it in a with statement.

    Args:
        path: The SQLite file; it is created, with its folder, when the journal is entered.
        fingerprint: Digest of everything that a value depends on beside its key.
        busy_timeout_s: Seconds to wait for another process that owns the file.
        say: Told in one line that something is damaged.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        *,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        say: Say = say_nothing,
    ) -> None:
        self._say = say
        self.path = path
        self.fingerprint = fingerprint
        self._busy_timeout_s = busy_timeout_s
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        """Open the file, and create or check it.

        Raises:
            PlanError: The file is somebody else's, or of a newer treeq-export.
            OutputError: It cannot be written, or another process owns it.
        """
        make_folder(self.path.parent)
        try:
            try:
                self._open()
            except _DamagedError as error:
                self.__exit__()
                aside = self.path.with_name(f"{self.path.stem}.damaged{self.path.suffix}")
                self._say(f"{error} It is moved to {aside.name}; what it held is measured again.")
                with self._errors_in_one_line():
                    self._move(aside)
                self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        with self._errors_in_one_line():
            self._database = sqlite3.connect(
                self.path, timeout=self._busy_timeout_s, isolation_level=None
            )
            self._prepare(self._database)

    def _move(self, aside: Path) -> None:
        """Move the file aside, and remove what SQLite has written beside it."""
        try:
            self.path.replace(aside)
            for suffix in ("-wal", "-shm", "-journal"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be moved ({error.strerror}). Move it elsewhere, then run the "
                "same command again."
            ) from error

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def lookup(self, node: str, prefix: str) -> dict[str, float]:
        """Return the known values of a node with one configuration of its left child.

        Args:
            node: The node's name.
            prefix: The configuration of the left child, "" where there is none.

        Returns:
            The value by configuration of the right child, in alphabetical order.

        Raises:
            PlanError: The file has been damaged since it was opened.
        """
        with self._errors_in_one_line():
            rows = self._open_database.execute(
                "SELECT * FROM evaluations "
                "WHERE fingerprint = ? AND node = ? AND prefix = ? ORDER BY suffix",
                (self.fingerprint, node, prefix),
            )
            return {row[3]: float(row[4]) for row in rows if row[-1] == _digest(*row[:-1])}

    def record(self, node: str, prefix: str, suffix: str, value: float, seconds: float) -> None:
        """Keep a measured value. Of one that is known already, the first is kept.

        Args:
            node: The node's name.
            prefix: The configuration of the left child, "" where there is none.
            suffix: The configuration of the right child.
            value: The measure; NaN and infinities are values like others.
            seconds: Time that it took to measure.

        Raises:
            OutputError: The file cannot be written.
        """
        row = (self.fingerprint, node, prefix, suffix, repr(float(value)), float(seconds))
        with self._errors_in_one_line():
            self._open_database.execute(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (*row, _digest(*row)),
            )

    @property
    def _open_database(self) -> sqlite3.Connection:
        if self._database is None:
            raise RuntimeError(f"{self.path}: the journal is closed; use it in a with statement.")
        return self._database

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Take the file for this process, make it a journal if it is new, and check it.

        A first owner that was killed before the table was there leaves a file that is still new.
        Nothing is written to a file of somebody else.

        Raises:
            PlanError: The file is damaged, or no journal of this version of treeq-export.
        """
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        (num_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        identity = tuple(
            database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        is_new = num_tables == 0 and identity == (0, 0)
        if not is_new and identity != (_APPLICATION_ID, _FORMAT_VERSION):
            if identity[0] == _APPLICATION_ID and identity[1] < _FORMAT_VERSION:
                raise self._damaged("a search journal of an older treeq-export")
            raise PlanError(
                f"{self.path}: not a search journal of this version of treeq-export. "
                "Remove the file; the search then starts again."
            )
        (finding,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            raise self._damaged(f"the search journal is damaged ({' '.join(finding.split())})")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        if is_new:
            database.executescript(_CREATE)
        self._drop_damaged_rows(database)

    def _drop_damaged_rows(self, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT * FROM evaluations").fetchall()
        damaged = [row for row in rows if row[-1] != _digest(*row[:-1])]
        for fingerprint, node, prefix, suffix, *_ in damaged:
            database.execute(
                "DELETE FROM evaluations "
                "WHERE fingerprint = ? AND node = ? AND prefix = ? AND suffix = ?",
                (fingerprint, node, prefix, suffix),
            )
        if damaged:
            self._say(
                f"{self.path}: {len(damaged)} of {len(rows)} values are damaged; "
                "they are measured again."
            )

    @contextmanager
    def _errors_in_one_line(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
            if code in _OWNED:
                raise OutputError(
                    f"{self.path}: another process has this search journal open. "
                    "Wait for it, or choose another --out folder."
                ) from error
            if code in _NOT_WRITABLE:
                raise OutputError(
                    f"{self.path}: cannot be read or written ({error}). "
                    "Free some space or choose another --out, then run the same command again."
                ) from error
            raise self._damaged(f"the search journal is damaged ({error})") from error
        except ValueError as error:
            raise self._damaged(f"the search journal is damaged ({error})") from error

    def _damaged(self, what: str) -> _DamagedError:
        return _DamagedError(f"{self.path}: {what}.")


def _digest(*row: object) -> str:
    """Return the digest of a row's columns but the last."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()
