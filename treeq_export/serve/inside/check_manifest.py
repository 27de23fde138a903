"""Does this repository, on this machine, run what was written and measured?

    python3 check_manifest.py [--backends DIR]

`launch.sh` asks before it starts the server, and every Python model for itself when it is loaded.
A file that is missing or differs, a runtime of another version: one line each, and no start.
Needs nothing but Python.
"""

import argparse
import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_AGAIN = "Write the repository again with `treeq-export serve`"
_BLOCK_BYTES = 1 << 20
_BACKENDS = Path("/opt/tritonserver/backends")
_ONNXRUNTIME_FILE = re.compile(r"libonnxruntime\.so\.(\d+\.\d+\.\d+)$")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        ValueError: It is missing or no JSON.
    """
    path = root / MANIFEST_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). {_AGAIN}.") from error


def check_model(folder: Path, version: str) -> None:
    """Check one model when it is loaded: its files, and the packages that it imports.

    Args:
        folder: The model's folder in the repository.
        version: The version that is loaded.

    Raises:
        ValueError: Something differs; says what.
    """
    manifest = read_manifest(folder.parent)
    problems = [
        *_find_files(folder.parent, manifest, folder.name, version),
        *_find_packages(manifest, folder.name),
    ]
    if problems:
        raise ValueError(problems[0])


def check_repository(root: Path, backends: Path) -> list[str]:
    """Check all files and runtimes.

    Args:
        root: The repository.
        backends: The server's backend directory.

    Returns:
        What differs, a line each.
    """
    manifest = read_manifest(root)
    problems = []
    if manifest["root"] not in (None, str(root)):
        problems.append(
            f"{root}: written for {manifest['root']}, where denoiser/config.pbtxt looks for the "
            f"custom-op library. {_AGAIN} --root {root}."
        )
    for name, versions in manifest["models"].items():
        there = [str(version) for version in versions if (root / name / str(version)).is_dir()]
        if not there:
            problems.append(f"{root / name}: no version. Copy the whole repository again.")
        for version in there:  # others were removed, to go back to an older one
            problems += _find_files(root, manifest, name, version)
        problems += _find_packages(manifest, name)
    return [*dict.fromkeys(problems), *_find_backend(manifest, backends)]


def _find_files(root: Path, manifest: dict[str, Any], model: str, version: str) -> Iterator[str]:
    """Yield what differs in a model's version and in what its versions share."""
    if int(version) not in manifest["models"].get(model, []):
        yield (
            f"{root / model / version}: not in {MANIFEST_FILE}. "
            "Add versions with `treeq-export serve --add-version`."
        )
    for name, entry in manifest["files"].items():
        top, second = Path(name).parts[:2]
        if top != model or (second.isdigit() and second != version):
            continue
        path = root / name
        if not path.is_file():
            yield f"{path}: missing. Copy the whole repository again."
        elif path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            yield f"{path}: not the file that {MANIFEST_FILE} names. {_AGAIN}, or copy it again."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):  # file_digest is not in a server's Python 3.10
            digest.update(block)
    return digest.hexdigest()


def _find_packages(manifest: dict[str, Any], model: str) -> Iterator[str]:
    """Yield the Python packages of a model that are missing or of another version."""
    for package, wanted in manifest["packages"].get(model, {}).items():
        found = _installed(package)
        if found is None:
            yield f"{model}: {package} is not installed. Run `pip install {package}=={wanted}`."
        elif _minor(found) != _minor(wanted):
            yield (
                f"{model}: {package} is {found}, expected {wanted}. "
                f"Run `pip install {package}=={wanted}`, or {_AGAIN.lower()} beside {found}."
            )


def _installed(package: str) -> str | None:
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _minor(version: str) -> tuple[str, ...]:
    """Return what decides: major and minor version."""
    return tuple(version.split("+")[0].split(".")[:2])


def _find_backend(manifest: dict[str, Any], backends: Path) -> Iterator[str]:
    """Yield what is wrong with the runtime inside the server itself, as far as it can be seen."""
    wanted = manifest["backend_version"]
    if manifest["backend"] == "onnxruntime":
        found = _onnxruntime_version(backends / "onnxruntime")
        right = found is None or _minor(found) == _minor(wanted)
    elif manifest["backend"] == "tensorrt":
        found = _tensorrt_version(int(wanted.split(".")[0]))
        right = found is None or found == wanted.split(".")[:3]
        found = None if found is None else ".".join(found)
    else:
        return
    what = f"the server's {manifest['backend']} backend"
    if found is None:
        _say(f"{what}: version not found, not checked (expected {wanted}).")
    elif not right:
        yield f"{what} has version {found}, expected {wanted}. {_AGAIN} for {found}."


def _onnxruntime_version(folder: Path) -> str | None:
    names = (_ONNXRUNTIME_FILE.match(path.name) for path in folder.glob("libonnxruntime.so.*"))
    return next((name[1] for name in names if name), None)


def _tensorrt_version(major: int) -> list[str] | None:
    """Return major, minor and patch of the libnvinfer that the loader finds."""
    try:
        number = ctypes.CDLL(f"libnvinfer.so.{major}").getInferLibVersion()
    except (OSError, AttributeError):
        return None
    return [str(number // 10000), str(number // 100 % 100), str(number % 100)]


def _say(line: str) -> None:
    sys.stderr.write(f"check_manifest: {line}\n")


def main() -> int:
    """Check the repository that this file lies in; 0 where it is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", type=Path, default=_BACKENDS)
    options = parser.parse_args()
    try:
        problems = check_repository(Path(__file__).absolute().parent, options.backends)
    except ValueError as error:
        problems = [str(error)]
    for problem in problems:
        _say(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
