"""The process that tries whether our plugins can be registered in a runtime, for doctor.

`python -m treeq_export.runners.registration RUNTIME` prints where the plugins come from. It is a
process of its own, because a runtime of another version may abort.
"""

import sys

from treeq_export.children import take_stdout
from treeq_export.errors import TreeqError
from treeq_export.runners.tensorrt_library import load_runtime, require_parser
from treeq_export.runners.tensorrt_runner import load_plugins


def main(name: str) -> None:
    """Register the plugins and say where they come from."""
    answer = take_stdout()
    try:
        runtime = load_runtime(name)
        source = load_plugins(runtime)
        require_parser(runtime)
    except TreeqError as error:
        sys.exit(str(error))
    answer.write(source)
    answer.close()


if __name__ == "__main__":
    main(sys.argv[1])
