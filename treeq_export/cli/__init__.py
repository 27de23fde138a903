"""The command line. Results go to stdout, progress and logs to stderr.

Exit status: 0 done, 1 the user can repair it, 2 wrong usage, 3 a gate is not met, 130 interrupted
(143 by SIGTERM).
"""

from treeq_export.cli import (
    bisect,
    build,
    client,
    compare,
    inspect,
    lint,
    loadtest,
    search,
    serve,
    stages,
    validate,
)  # each adds its commands
from treeq_export.cli.console import main

__all__ = [
    "bisect",
    "build",
    "client",
    "compare",
    "inspect",
    "lint",
    "loadtest",
    "main",
    "search",
    "serve",
    "stages",
    "validate",
]
