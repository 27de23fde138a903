"""Every error that a user can meet.

    TreeqError               exit status 1: the user can repair it
    |-- RecipeError          the recipe: unknown key, wrong type, value out of range
    |-- CheckpointError      the checkpoint: missing, truncated, unknown class, NaN weights
    |-- FormatError          a number format: bits, group size or rotation that does not fit
    |-- PlanError            the plan: missing piece, other checkpoint, newer format
    |-- CompileError         the graph: a layer that did not become integer arithmetic
    |-- RunnerError          a runtime: missing package, input of a wrong shape
    |-- ServeError           a Triton repository or server: does not fit, unreachable, refuses
    |-- OutputError          the output folder: not writable, disk full
    |-- OutOfMemoryError     memory: too little for what the recipe asks
    `-- GateError            exit status 3: a parity or quality gate is not met

A message is one line: the file or layer, what was received, what was expected, the remedy.
"""


class TreeqError(Exception):
    """Base of all errors that end a command with one line on stderr."""

    exit_status = 1


class RecipeError(TreeqError):
    """The recipe cannot be used as it is written."""


class CheckpointError(TreeqError):
    """The checkpoint cannot be loaded."""


class FormatError(TreeqError):
    """A number format does not fit the layer it is meant for."""


class PlanError(TreeqError):
    """The plan lacks a piece or belongs to something else; names the stage to run first."""


class CompileError(TreeqError):
    """A graph could not be compiled, or its audit failed."""


class RunnerError(TreeqError):
    """A runtime could not load or run a model."""


class ServeError(TreeqError):
    """A Triton repository does not fit, or a server is unreachable, refuses or fails.

    Args:
        message: One line.
        kind: "unreachable", "timeout", "refused" (the request is wrong) or "failed" (the server
            is); "repository" where no server is involved.
    """

    def __init__(self, message: str, kind: str = "repository") -> None:
        super().__init__(message)
        self.kind = kind


class OutputError(TreeqError):
    """A file could not be written; nothing half written is left behind."""


class OutOfMemoryError(TreeqError):
    """Memory ran out, or a size is beyond all memory; names the recipe's keys to lower."""


class GateError(TreeqError):
    """A parity or quality gate of the recipe is not met."""

    exit_status = 3
