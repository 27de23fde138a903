"""A run folder and what is loaded for it: at most once, and only when a stage needs it."""

import errno
import fcntl
import os
import shlex
import stat
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from treeq_export import __version__
from treeq_export.artefacts import OTHER_OUT, make_folder, remove_stale, sha256_of_file, write_json
from treeq_export.errors import OutputError, PlanError
from treeq_export.model.checkpoint import Checkpoint, load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.pipeline_scheduler import (
    check_scheduler,
    describe_scheduler,
    resolve_scheduler,
)
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors, load_plan, load_tensors
from treeq_export.progress import Say, say_nothing
from treeq_export.reading import first_problem, read_record
from treeq_export.recipe import Recipe
from treeq_export.run_folder import RunFolder

_PLAN_FILES = {RunFolder.PLAN, RunFolder.TENSORS, RunFolder.FINETUNE, RunFolder.FINETUNED}
_WRITABLE = "Make it writable, or copy the folder and use the copy."


class StageRecord(BaseModel):
    """What a finished stage left behind.

    Attributes:
        fingerprint: Digest of everything that the stage's result depends on.
        seconds: Time that it took.
        outputs: SHA-256 by file, relative to the run folder.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    seconds: float
    outputs: dict[str, str]


class RunRecord(BaseModel):
    """`run.json`: the recipe in use and the finished stages."""

    model_config = ConfigDict(extra="forbid")

    recipe_path: str
    overrides: list[str]
    recipe: dict[str, Any]
    stages: dict[str, StageRecord]


class Workspace:
    """A run folder with its recipe, and lazily its checkpoint, model, plan and tensors.

    It holds the folder's lock until it is closed; use it in a with statement.

    Args:
        run: The run folder; it is created.
        recipe: The recipe.
        recipe_path: File that the recipe came from, for the commands in the report.
        overrides: The `--set` assignments, for the commands in the report.
        read_only: Whether nothing is written into the folder. Others may then read it too.
        like: A workspace with the same model section, whose checkpoint, model and samples of full
            precision are taken.

    Attributes:
        fp_samples: Folder of the cached full-precision samples; runs that are compared share one.
        say: Called with what a person should know before a long stage starts.

    Raises:
        OutputError: The folder cannot be created or written to, or another process works in it.
        PlanError: The run's `run.json` is malformed.
        RecipeError: The scheduler of the checkpoint's pipeline is not supported.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        recipe_path: str = "",
        overrides: tuple[str, ...] = (),
        *,
        read_only: bool = False,
        like: "Workspace | None" = None,
    ) -> None:
        self.recipe = resolve_scheduler(recipe)
        self.run = run
        if not read_only:
            make_folder(run, _WRITABLE if (run / RunFolder.RUN).is_file() else OTHER_OUT)
        self.recipe_path = recipe_path
        self.overrides = overrides
        self.say: Say = like.say if like else say_nothing
        self.fp_samples = like.fp_samples if like else run / RunFolder.SAMPLES
        self._like = like
        self.stages: dict[str, StageRecord] = {}
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._lock = _lock_folder(run, shared=read_only)
        if not read_only:
            remove_stale(self.fp_samples)  # nothing may be left to write there
        try:
            if (run / RunFolder.RUN).is_file():
                self.stages = read_run(run).stages
        except BaseException:
            self.close()
            raise

    @classmethod
    def reopen(cls, run: Path, *, read_only: bool = False) -> "Workspace":
        """Return the workspace of an existing run folder.

        Args:
            run: The run folder.
            read_only: Whether nothing is written into it.

        Raises:
            PlanError: The folder holds no run, or its `run.json` is malformed.
        """
        record = read_run(run)
        try:
            recipe = Recipe.model_validate(record.recipe)
        except ValidationError as error:
            raise PlanError(
                f"{run / RunFolder.RUN}: {first_problem(error)} {_again(run)}"
            ) from error
        overrides = tuple(record.overrides)
        return cls(run, recipe, record.recipe_path, overrides, read_only=read_only)

    def sibling(self, run: Path, recipe: Recipe) -> "Workspace":
        """Return the workspace of another folder that shares the checkpoint and the loaded model.

        Args:
            run: The other folder.
            recipe: Recipe of the sibling, with the same model section.

        Raises:
            OutputError: The folder cannot be created or written to.
            PlanError: The run's `run.json` is malformed.
        """
        return Workspace(run, recipe, self.recipe_path, self.overrides, like=self)

    def close(self) -> None:
        """Give the folder free for another process."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sha256(self, path: Path) -> str:
        """Return the digest of a file's bytes, computed once while the file stays as it is."""
        now = path.stat()
        key = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        known = self._digests.get(path)
        if known is None or known[0] != key:
            known = self._digests[path] = (key, sha256_of_file(path))
        return known[1]

    def save(self) -> None:
        """Write `run.json`."""
        record = RunRecord(
            recipe_path=self.recipe_path,
            overrides=list(self.overrides),
            recipe=self.recipe.model_dump(mode="json", by_alias=True),
            stages=self.stages,
        )
        write_json(self.run / RunFolder.RUN, record.model_dump(mode="json"))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened and digested."""
        if self._like is not None:
            return self._like.checkpoint
        return open_checkpoint(Path(self.recipe.model.checkpoint), self.recipe.model.variant)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The full-precision model."""
        if self._like is not None:
            return self._like.denoiser
        model = load_model(self.checkpoint)
        denoiser = make_denoiser(model, self.checkpoint, self.recipe.model)
        check_scheduler(self.recipe)
        for note in (*self.checkpoint.notes, describe_scheduler(self.recipe)):
            if note is not None:
                self.say(note)
        return denoiser

    @cached_property
    def plan(self) -> Plan:
        """The plan, checked against the checkpoint."""
        return load_plan(self.run, self.checkpoint.sha256)

    @cached_property
    def tensors(self) -> Tensors:
        """The calibrated plan's tensors."""
        return load_tensors(self.run, self.plan)

    def forget(self, files: Collection[str]) -> None:
        """Drop the loaded plan and tensors if they were loaded from one of these files."""
        if not _PLAN_FILES.isdisjoint(files):
            for name in ("plan", "tensors"):
                vars(self).pop(name, None)

    def reproduce_commands(self) -> list[str]:
        """Return the command lines that repeat the run."""
        words = ["treeq-export", "run", self.recipe_path or "RECIPE"]
        words += ["--out", self.run.absolute().name]
        for override in self.overrides:
            words += ["--set", override]
        return [f"pip install treeq-export=={__version__}", shlex.join(words)]


def _lock_folder(run: Path, *, shared: bool) -> IO[bytes] | None:
    """Hold the folder's lock until the returned file is closed; the kernel frees it on a kill.

    A shared lock writes nothing; it is None where there is no file to lock.

    Raises:
        OutputError: Another process works in the folder, or the lock is no regular file.
    """
    path = run / RunFolder.LOCK
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if shared and error.errno in (errno.ENOENT, errno.EACCES):
            return None
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    file = os.fdopen(descriptor, "rb")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OutputError(
            f"{run}: another treeq-export is at work in it. Wait for it, or choose another folder."
        ) from error
    return file


def _no_lock(path: Path) -> OutputError:
    return OutputError(
        f"{path}: received a link or a special file, expected a regular file. "
        "Remove it, then run the same command again."
    )


def read_run(run: Path) -> RunRecord:
    """Read `run.json`.

    Raises:
        PlanError: Missing or malformed.
    """
    path = run / RunFolder.RUN
    if run.is_file():
        raise PlanError(
            f"{run}: received a file, expected a run folder, as `treeq-export run` writes it. A "
            "graph that was made elsewhere is no input; give it to its runtime directly."
        )
    if not path.is_file():
        raise PlanError(f"{path}: missing. Run `treeq-export run RECIPE --out {run}` first.")
    return read_record(path, RunRecord, error=PlanError, remedy=_again(run))


def _again(run: Path) -> str:
    return f"Remove it and run `treeq-export run RECIPE --out {run}` again."
