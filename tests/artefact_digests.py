"""Digests of all artefacts of a run of each family, to show that a change left them equal.

    python -m tests.artefact_digests make FOLDER --command .venv/bin/treeq-export
    python -m tests.artefact_digests list FOLDER > before.json
    python -m tests.artefact_digests compare before.json after.json

`make` runs all stages, builds engines and writes Triton repositories for a tiny DiT, PixArt, SD3
and Flux. Use the same FOLDER before and after: records hold paths. `list` takes any folder of runs.
Times, memory, the machine and what follows from them are left out of JSON files; engines and
figures are listed by name alone, because their bytes are not the same twice.
"""

import argparse
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from tests.tiny_models import TINY_CONFIGS, TINY_LATENT, save_tiny

# Strategy, training and number formats differ, so that the four runs reach most of the code.
SECTIONS: dict[str, dict[str, Any]] = {
    "dit": {
        "search": {"strategy": "tss", "branch_budget": {"parameter_fraction": 0.2, "grids": 2}},
        "finetune": {"mode": "peft", "steps": 4, "batch_size": 2},
    },
    "pixart": {"search": {"strategy": "greedy", "activation_scale": "tensor_static"}},
    "sd3": {
        "search": {"strategy": "integer_programming", "group_size": 32},
        "compile": {"targets": ["portable", "ort", "tensorrt"]},  # groups need the plugin
    },
    "flux": {"search": {"strategy": "uniform", "budget": {"weight_bits": 4.0}}},
}
NOT_COMPARED = re.compile(
    r".*(_s|_ms|_us|seconds|_bytes_per_s|peak.*_bytes|rss.*|memory.*)|time|times|seconds|created"
    r"|environment|engine_sha256|machine|processor|threads|rounds|bench|timings|raw|speedup.*|interval|date"
)
MODE_BLS = ("--mode", "bls", "--target", "portable")
BY_NAME = {".engine", ".png", ".html", ".so", ".lock", ".log", ".timing"}


def make(folder: Path, command: str, names: list[str]) -> None:
    """Write the checkpoints and recipes, and run everything."""
    for name in names:
        save_tiny(name, folder / name / "checkpoint")
        recipe = {
            "name": name,
            "model": {"checkpoint": "checkpoint", "latent_size": TINY_LATENT},
            "sampler": {"steps": 3, "batch_size": 2},
            "calibrate": {"num_samples": 4, "max_tokens": 128, "num_clip_steps": 8},
            "compile": {"targets": ["portable", "ort", "tensorrt", "tensorrt-native"]},
            "bench": {"batch_sizes": [2], "rounds": 3, "threads": 1},
            "evaluate": {"num_samples": 4},
            "finetune": {"mode": "none"},
        } | SECTIONS[name]
        recipe["search"] = {
            "rotation_group": 32, "num_samples": 4, "num_rows": 16, "keep": 4,
            "weight_candidates": [2, 3, 4], "activation_candidates": [3, 4, 8],
            "budget": {"weight_bits": 3.0, "activation_bits": 4.0},
        } | recipe["search"]  # fmt: skip
        (folder / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = str(folder / name / "run")
        again = ["--run", run]
        for arguments in (
            ["run", str(folder / name / "recipe.yaml"), "--out", run],
            ["build", *again, "--runtime", "tensorrt-rtx", "--gpu", "sm_80"],
            ["serve", *again],
            ["serve", *again, *MODE_BLS, "--out", f"{run}/triton-bls"],
        ):
            print(name, arguments[0], flush=True)
            status = subprocess.run([command, *arguments], check=False).returncode
            if status not in (0, 3):  # 3: a random model misses a gate
                sys.exit(f"{' '.join(arguments)}: exit status {status}.")


def without_times(value: Any) -> Any:
    """Return a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {
            key: without_times(part) for key, part in value.items() if not is_left_out(key, part)
        }
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value


def is_left_out(key: str, part: Any) -> bool:
    """Whether a value is a time, the digest of a record that holds times, or what follows."""
    seal = key == "sha256" and isinstance(part, str)
    record = key.endswith((".json", ".html")) and isinstance(part, str) and len(part) == 64
    stages = key == "stages" and all(isinstance(each, float) for each in part.values())
    return seal or record or stages or NOT_COMPARED.fullmatch(key) is not None


def digest(path: Path) -> str:
    """Return the digest of what is compared of a file."""
    if path.suffix in BY_NAME:
        return "by name"
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(without_times(json.loads(data))).encode()
    if path.suffix == ".safetensors":  # the order of its metadata is not the same twice
        with safe_open(path, "np") as file:
            metadata = {k: v for k, v in (file.metadata() or {}).items() if k != "sha256"}
            data = repr(sorted(metadata.items())).encode()
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                data += f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as journal:
            columns = "fingerprint, node, prefix, suffix, value"
            rows = journal.execute(f"SELECT {columns} FROM evaluations").fetchall()
            data = repr(sorted(rows)).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def list_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(path) for path in files}


def compare(before: Path, after: Path) -> int:
    """Print what differs and return how much."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differing = [name for name in sorted({**old, **new}) if old.get(name) != new.get(name)]
    for name in differing:
        kind = "differs" if name in old and name in new else "new" if name in new else "missing"
        print(f"{kind}: {name}")
    print(f"{len({**old, **new}) - len(differing)} equal, {len(differing)} not")
    return len(differing)


def main() -> None:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["make", "list", "compare"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--command", default="treeq-export")
    parser.add_argument("--only", choices=TINY_CONFIGS, action="append")
    options = parser.parse_args()
    if options.what == "make":
        make(options.paths[0].resolve(), options.command, options.only or list(TINY_CONFIGS))
    elif options.what == "list":
        print(json.dumps(list_digests(options.paths[0]), indent=1))
    else:
        sys.exit(1 if compare(*options.paths) else 0)


if __name__ == "__main__":
    main()
