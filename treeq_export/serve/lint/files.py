"""Rules about the repository as a whole: its configurations' form, manifest.json, launch.sh."""

import re
from pathlib import PurePosixPath

from treeq_export.artefacts import sha256_of_file
from treeq_export.serve.lint.read import MAIN, Remark, Remarks, Repository, is_file
from treeq_export.serve.others import LAUNCH_FILE, MANIFEST_FILE
from treeq_served.check_manifest import find_unfit

_LOADS_MODELS = re.compile(r"--model-control-mode[= ]\"?(explicit|poll)")
_ALL_ADDRESSES = re.compile(r"0\.0\.0\.0|\[?::\]?(?![\da-f])")
_AGAIN = "Run `treeq-export serve` again, or copy the whole repository again."


def config_is_there(repository: Repository) -> Remarks:
    """Every model of ours has a config.pbtxt; Triton guesses one, without any batching."""
    for folder in repository.own_models:
        if not (folder.path / MAIN).is_file():
            yield Remark(
                folder.path,
                f"received no {MAIN}, expected one: Triton makes one up. Write one, or run "
                "`treeq-export serve` again.",
            )


def schema(repository: Repository) -> Remarks:
    """Every configuration is text that Triton's schema accepts."""
    for folder in repository.folders.values():
        for path, problem in folder.unread:
            yield Remark(path, f"{problem} The server does not load the model. Correct this place.")


def manifest_is_readable(repository: Repository) -> Remarks:
    """manifest.json is what serve writes."""
    if repository.manifest_error:
        yield Remark(
            repository.root / MANIFEST_FILE,
            f"{repository.manifest_error} Run `treeq-export serve` again.",
        )


def path_is_fit(repository: Repository) -> Remarks:
    """The repository lies where Triton's Python backend can start a model's process."""
    configs = (config for folder in repository.folders.values() for config in folder.configs)
    unfit = find_unfit(repository.final_root)
    if unfit is not None and any(config.backend == "python" for config in configs):
        yield Remark(repository.root, unfit)


def launch_is_guarded(repository: Repository) -> Remarks:
    """launch.sh does not offer loading of models to all the network."""
    path = repository.root / LAUNCH_FILE
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    commands = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    if not _LOADS_MODELS.search(commands) or "restricted-" in commands:
        return
    for protocol in ("http", "grpc"):
        address = re.search(rf"--{protocol}-address[= ](\S+)", commands)
        if address is None or _ALL_ADDRESSES.search(address[1]):
            yield Remark(
                path,
                f"received --{protocol}-address {'none' if address is None else address[1]}, with "
                "model control by API, expected an address of your own: whoever reaches the port "
                "may load models, which can be code. Name 127.0.0.1, or restrict the API by "
                "--http-restricted-api and --grpc-restricted-protocol.",
            )


def file_is_as_written(repository: Repository) -> Remarks:
    """Every file that manifest.json lists has the size and the digest that it says."""
    manifest = repository.manifest
    if manifest is None:
        return
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
        elif not is_file(path):
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
