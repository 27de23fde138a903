"""What lies in a repository that serve did not write: it is kept, or the command is refused.

A folder is a repository of serve if its manifest.json is one. What serve wrote are the files that
the manifest lists, the four at the root, and the folders of a version that was being written.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from treeq_export.artefacts import is_workplace, link_tree
from treeq_export.errors import OutputError, ServeError
from treeq_export.reading import read_record
from treeq_export.records.serve import ServeManifest

MANIFEST_FILE = "manifest.json"
CHECK_FILE = "check_manifest.py"
LAUNCH_FILE = "launch.sh"
README_FILE = "README.md"
_CACHE = "__pycache__"  # Python leaves it beside a model's code


def read_manifest(root: Path) -> ServeManifest:
    """Read a repository's manifest.

    Raises:
        ServeError: It is missing or malformed.
    """
    remedy = "Write the repository first, without --add-version."
    return read_record(root / MANIFEST_FILE, ServeManifest, error=ServeError, remedy=remedy)


def find_repository(root: Path) -> ServeManifest | None:
    """Return the manifest of a repository that may be replaced; None if the path does not exist.

    Raises:
        OutputError: The path exists but was not written by `serve`.
    """
    if not os.path.lexists(root):
        return None
    try:
        if root.is_dir() and all(is_workplace(path) for path in root.iterdir()):
            return None
        return read_manifest(root)
    except ServeError as error:
        raise OutputError(
            f"{root}: exists but was not written by `treeq-export serve`. Choose another --out."
        ) from error


def keep_others(root: Path, new: Path, old: ServeManifest, manifest: ServeManifest) -> None:
    """Put what serve did not write into the repository that will take the place of the old one.

    Args:
        root: The old repository.
        new: The new one.
        old: Manifest of the old one.
        manifest: Manifest of the new one.

    Raises:
        OutputError: Something has no place in the new one: it lies in a model or a version that
            will be gone, or where serve writes.
    """
    for name in sorted(_find_others(root, old)):
        gone = name.parts[0] in old.models and name.parts[0] not in manifest.models
        if len(name.parts) > 1 and name.parts[0] in manifest.models and name.parts[1].isdigit():
            gone = not (new / name.parts[0] / name.parts[1]).is_dir()
        if gone or os.path.lexists(new / name):
            raise OutputError(
                f"{root / name}: not written by serve, and in the way of the new repository. "
                "Move it elsewhere, or choose another --out."
            )
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        link_tree(root / name, new / name)


def _find_others(root: Path, manifest: ServeManifest) -> Iterator[PurePath]:
    """Yield what is not ours: files, links, and folders that hold nothing of ours."""
    ours = {
        PurePath(name)
        for name in (*manifest.files, MANIFEST_FILE, CHECK_FILE, LAUNCH_FILE, README_FILE)
    }
    pending = {PurePath(model, str(manifest.pending)) for model in manifest.models}
    folders = {parent for name in ours for parent in name.parents}
    folders |= {PurePath(model) for model in manifest.models}

    def walk(folder: PurePath) -> Iterator[PurePath]:
        for path in (root / folder).iterdir():
            name = folder / path.name
            if name in ours or name in pending or is_workplace(path):
                continue
            if path.name == _CACHE and name.parts[0] in manifest.models:
                continue
            if name in folders and path.is_dir() and not path.is_symlink():
                yield from walk(name)
            else:
                yield name

    return walk(PurePath())
