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
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

Check = Callable[[Any], bool]

MANIFEST_FILE = "manifest.json"
AGAIN = "Write the repository again with `treeq-export serve`"
_BLOCK_BYTES = 1 << 20
_BACKENDS = Path("/opt/tritonserver/backends")
_MAX_BYTES = 16 << 20
_VERSION = re.compile(r"\d{1,9}\.\d")
_UNFIT = re.compile(r"[^\w/.,:=@%+~^-]")  # letters and digits are those of any language
_ONNXRUNTIME_FILE = re.compile(r"libonnxruntime\.so\.(\d+\.\d+\.\d+)$")


def find_unfit(root: Path) -> str | None:
    """Return what keeps a server from serving a folder because of the folder's name.

    Triton starts the processes of Python models by a shell that reads the path as it is: at a space
    the server stops working without a word. And config.pbtxt has paths in quotes.

    Args:
        root: The repository, or where it will be.

    Returns:
        One line; None where the name is fit.
    """
    unfit = _UNFIT.search(str(root))
    if unfit is None:
        return None
    return (
        f"{str(root)!r}: holds {unfit[0]!r}, which Triton's Python backend cannot have in a path. "
        "Move the repository to a path of letters, digits and / . _ - only."
    )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: It is missing, too large, no JSON or no object; says so in one line.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")  # noqa: TRY301
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). {AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object. {AGAIN}.")  # noqa: TRY004
    return content


def read_manifest(root: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        ValueError: It is missing, no JSON, or of another form.
    """
    path = root / MANIFEST_FILE
    manifest = read_object(path)
    for key, (is_right, expected) in _FORM.items():
        if key not in manifest or not is_right(manifest[key]):
            raise ValueError(f"{path}: {key}: expected {expected}. {AGAIN}.")
    return manifest


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_name(value: Any) -> bool:
    return _is_text(value) and value not in ("", ".", "..") and "/" not in value


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_path(value: str) -> bool:
    return "/" in value and all(map(_is_name, value.split("/")))


def _each(is_key: Check, is_value: Check) -> Check:
    """Return a check of every key and value of an object."""
    return lambda found: (
        isinstance(found, dict) and all(is_key(k) and is_value(v) for k, v in found.items())
    )


_FORM: dict[str, tuple[Check, str]] = {
    "root": (lambda value: value is None or _is_text(value), "a path, or null"),
    "backend": (_is_text, "the name of a backend"),
    "backend_version": (
        lambda value: _is_text(value) and _VERSION.match(value) is not None,
        "a version, such as 1.2.3",
    ),
    "models": (
        _each(_is_name, lambda value: isinstance(value, list) and all(map(_is_number, value))),
        "the versions of each model",
    ),
    "packages": (
        _each(_is_name, _each(_is_name, _is_text)),
        "the packages of each model with their versions",
    ),
    "files": (
        _each(
            _is_path,
            lambda value: (
                isinstance(value, dict)
                and _is_number(value.get("bytes"))
                and _is_text(value.get("sha256"))
            ),
        ),
        "bytes and sha256 of each file below the repository",
    ),
}


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
        Lines about what differs, or about a manifest that cannot be read.
    """
    unfit = find_unfit(root)
    try:
        manifest = read_manifest(root)
    except ValueError as error:
        return [str(error)]
    problems = [] if unfit is None else [unfit]
    if manifest["root"] not in (None, str(root)):
        problems.append(
            f"{root}: written for {manifest['root']}, where denoiser/config.pbtxt looks for the "
            f"custom-op library. {AGAIN} --root {root}."
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
        try:
            if not path.is_file():
                yield f"{path}: missing. Copy the whole repository again."
            elif path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                yield (
                    f"{path}: not the file that {MANIFEST_FILE} names. {AGAIN}, or copy it again."
                )
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror}). Give the server's user the right to."


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
                f"Run `pip install {package}=={wanted}`, or {AGAIN.lower()} beside {found}."
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
        yield f"{what} has version {found}, expected {wanted}. {AGAIN} for {found}."


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
    printable = "".join(each if each.isprintable() else "?" for each in line)
    sys.stderr.write(f"check_manifest: {printable}\n")


def main() -> int:
    """Check the repository that this file lies in; 0 where it is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", type=Path, default=_BACKENDS)
    options = parser.parse_args()
    problems = check_repository(Path(__file__).absolute().parent, options.backends)
    for problem in problems:
        _say(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
