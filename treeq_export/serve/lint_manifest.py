"""Rule about manifest.json: the files are those that serve wrote.

Other programs have files of that name too: one without "treeq_version" is not ours.
"""

from pathlib import PurePosixPath

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import ServeError
from treeq_export.reading import parse_record, read_bytes, read_json
from treeq_export.records.serve import ServeManifest
from treeq_export.serve.lint_read import Remark, Remarks, Repository
from treeq_export.serve.others import MANIFEST_FILE

_AGAIN = "Run `treeq-export serve` again, or copy the whole repository again."


def file_is_as_written(repository: Repository) -> Remarks:
    """Every file that manifest.json lists has the size and the digest that it says."""
    path = repository.root / MANIFEST_FILE
    if not path.is_file():
        return
    try:
        if "treeq_version" not in read_json(path, error=ServeError, remedy=_AGAIN):
            return
        data = read_bytes(path, error=ServeError, remedy=_AGAIN)
        manifest = parse_record(data, ServeManifest, MANIFEST_FILE, error=ServeError, remedy=_AGAIN)
    except (ServeError, TypeError) as error:
        if not repository.manifest_error:  # else another rule has said so
            yield Remark(path, f"received what is no manifest ({error})")
        return
    yield from _compare(repository, manifest)


def _compare(repository: Repository, manifest: ServeManifest) -> Remarks:
    for name, expected in manifest.files.items():
        parts = PurePosixPath(name).parts
        path = repository.root / name
        if name.startswith("/") or ".." in parts or len(parts) < 2:
            yield Remark(
                repository.root / MANIFEST_FILE,
                f"files: received {name!r:.80}, expected a file of a model. {_AGAIN}",
            )
        elif parts[1].isdigit() and not (repository.root / parts[0] / parts[1]).is_dir():
            continue  # a version that was removed, to go back to an older one
        elif not path.is_file():
            yield Remark(path, f"received no such file, expected what serve wrote. {_AGAIN}")
        elif path.stat().st_size != expected.bytes:
            yield Remark(
                path,
                f"received {path.stat().st_size} bytes, expected the {expected.bytes} that serve "
                f"wrote. {_AGAIN}",
            )
        elif sha256_of_file(path) != expected.sha256:
            yield Remark(
                path, f"received other bytes, expected the sha256 of {MANIFEST_FILE}. {_AGAIN}"
            )
