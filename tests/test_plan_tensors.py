"""The tensors beside a plan: what is missing, damaged, of another plan or cannot be written."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import OutputError, PlanError
from treeq_export.plan import load_plan, load_tensors, save_plan
from treeq_export.run_folder import RunFolder

GOLDEN = Path(__file__).parent / "golden"
PLAN = load_plan(GOLDEN)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the golden plan."""
    for name in (RunFolder.PLAN, RunFolder.TENSORS):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def message_of(run: Path) -> str:
    plan = load_plan(run)
    with pytest.raises(PlanError) as caught:
        load_tensors(run, plan)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_plan_without_tensors(tmp_path: Path):
    save_plan(tmp_path, PLAN)
    assert message_of(tmp_path) == (
        f"{tmp_path / RunFolder.TENSORS}: the plan has no scales and codes. "
        f"Run `treeq-export calibrate --run {tmp_path}` first."
    )


def test_the_tensors_file_is_missing(run: Path):
    (run / RunFolder.TENSORS).unlink()
    assert "the plan has no scales and codes" in message_of(run)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, swap, flip_one_bit, Path.unlink])
def test_another_or_damaged_tensors_file(damage: Callable[[Path], None], run: Path):
    path = run / RunFolder.TENSORS
    damage(path)
    text = message_of(run)
    assert text.startswith(f"{path}: ")
    assert ("not the file that plan.json names" in text) == path.exists()
    assert f"Run `treeq-export calibrate --run {run}` " in text


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, None])
def test_a_named_file_that_is_no_safetensors(data: bytes | None, run: Path):
    path = run / RunFolder.TENSORS
    path.write_bytes(path.read_bytes()[:-7] if data is None else data)
    raw = json.loads((run / RunFolder.PLAN).read_text())
    raw["tensors_sha256"] = sha256_of_file(path)
    (run / RunFolder.PLAN).write_text(json.dumps(raw))
    text = message_of(run)
    assert text.startswith(f"{path}: ")
    assert text.endswith("Calibrate again.")


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("proj_out.codes", None, "received nothing, expected (2, 6)"),
        ("proj_out.codes", np.zeros((6, 2), np.int8), "received (6, 2), expected (2, 6)"),
        ("proj_out.weight_scale", np.zeros((2, 2)), "received (2, 2), expected (2, 1)"),
        (
            "transformer_blocks.0.ff.net.2.weight_scale",
            np.zeros((6, 1)),
            "received (6, 1), expected (6, 2)",
        ),
        (
            "transformer_blocks.0.ff.net.2.activation_step",
            np.zeros(2),
            "received (2,), expected (1,)",
        ),
        (
            "transformer_blocks.0.attn1.to_q.activation_step",
            None,
            "received nothing, expected (1,)",
        ),
        (
            "transformer_blocks.0.ff.net.2.branch.R",
            np.zeros((2, 4, 4)),
            "received (2, 4, 4), expected (2, 4, 6)",
        ),
        (
            "transformer_blocks.0.ff.net.2.branch.L",
            None,
            "received nothing, expected (3, 4, 2)",
        ),
    ],
)
def test_a_tensor_of_a_wrong_shape(
    name: str, tensor: np.ndarray | None, problem: str, tmp_path: Path
):
    tensors = load_tensors(GOLDEN, PLAN)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_plan(tmp_path, PLAN, tensors)
    assert message_of(tmp_path) == (
        f"{tmp_path / RunFolder.TENSORS}: {name}: {problem}. Calibrate again."
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    for tensors in (None, load_tensors(GOLDEN, PLAN)):
        with pytest.raises(OutputError, match=r"file/plan\.\w+: cannot be written"):
            save_plan(tmp_path / "file", PLAN, tensors)


def test_a_write_that_fails_leaves_the_old_plan(run: Path):
    """The real failure of the safetensors library, in a process with RLIMIT_FSIZE."""
    script = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from treeq_export.errors import OutputError
        from treeq_export.plan import load_plan, load_tensors, save_plan

        run = Path(sys.argv[1])
        plan = load_plan(run)
        tensors = load_tensors(run, plan) | {"large": np.zeros(10000)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_plan(run, plan, tensors)
        except OutputError as error:
            print(error)
    """
    before = {path: path.read_bytes() for path in run.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(run)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(
        f"{run / RunFolder.TENSORS}: larger than `ulimit -f` or the file sys"
    )
    assert {path: path.read_bytes() for path in run.iterdir()} == before
