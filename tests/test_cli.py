"""The commands, in this process. Bad input is in test_bad_input.py."""

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from tests.commands import measure_nothing
from treeq_export import __version__
from treeq_export.bench import stage as bench_stage
from treeq_export.cli import console, main
from treeq_export.errors import CompileError, GateError, TreeqError
from treeq_export.pipeline import run as pipeline
from treeq_export.pipeline.stages import STAGE_NAMES
from treeq_export.plan import json_schema, load_plan, plan_to_json

UNREACHABLE = "validate.gates.min_end_to_end_sqnr_db=1000"


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], env={"COLUMNS": "200"})


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def no_memory_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench measures no memory, which takes a process per target and has its own tests."""
    monkeypatch.setattr(bench_stage, "measure_memory", measure_nothing)


class TestUsage:
    @pytest.mark.parametrize("command", ["", *main.commands])
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_help(self, command: str, flag: str) -> None:
        result = call(*command.split(), flag)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")
        assert "--help" in result.stdout
        assert result.stderr == ""

    def test_every_stage_is_a_command(self) -> None:
        others = {"run", "compare", "inspect", "doctor", "build", "bisect"}
        serving = {"serve", "lint", "client", "health", "web", "loadtest"}
        assert set(main.commands) == {*others, *serving, *STAGE_NAMES}

    def test_every_option_is_explained(self) -> None:
        silent = [
            (name, option.opts)
            for name, command in main.commands.items()
            for option in command.params
            if isinstance(option, click.Option) and not option.help
        ]
        assert silent == []

    def test_version(self) -> None:
        assert call("--version").stdout == f"treeq-export, version {__version__}\n"

    @pytest.mark.parametrize(
        "args",
        [
            ["paint"],
            ["run"],
            ["run", "r.yaml"],
            ["run", "r.yaml", "--out"],
            ["run", "r.yaml", "--out", "o", "--from", "serve"],
            ["run", "r.yaml", "--out", "o", "--fast"],
            ["search"],
            ["search", "--run", "o", "--noise", "1.5"],
            ["search", "--run", "o", "--executor", "slurm"],
            ["bench", "o"],
            ["inspect"],
            ["inspect", "--schema", "--run", "o"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_status_2(
        self, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = call(*args)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("Error: ")
        assert list(tmp_path.iterdir()) == []

    def test_starts_without_a_framework(self) -> None:
        program = (
            "import sys, treeq_export.cli; "
            "print({'torch', 'numpy', 'onnx', 'onnxruntime', 'diffusers'} & set(sys.modules))"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"

    def test_as_a_module(self) -> None:
        command = [sys.executable, "-m", "treeq_export.cli", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"treeq-export, version {__version__}\n"

    def test_reader_that_stops_reading(self) -> None:
        command = [sys.executable, "-m", "treeq_export.cli", "inspect", "--schema"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1

    @pytest.mark.parametrize("words", ["--version", "--help", "inspect --schema"])
    def test_full_stdout_is_one_line(self, words: str) -> None:
        command = [sys.executable, "-m", "treeq_export.cli", *words.split()]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(b"treeq-export: [Errno 28] No space left on device.")
        assert done.stderr.count(b"\n") == 1

    @pytest.mark.parametrize(
        ("closed", "words", "status"),
        [
            (">&-", "inspect --schema", 0),
            ("<&- >&- 2>&-", "inspect --schema", 0),
            ("2>&-", "inspect --run absent", 1),
            ("2>/dev/full", "inspect --run absent", 1),
        ],
    )
    def test_closed_streams(self, closed: str, words: str, status: int) -> None:
        command = f"exec {sys.executable} -m treeq_export.cli {words} {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
        assert done.returncode == status
        assert b"Traceback" not in done.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "line"),
        [
            (TreeqError("a: b.\n  c"), 1, "a: b. c"),
            (CompileError("no"), 1, "no"),
            (GateError("unmet"), 3, "unmet"),
            (
                KeyboardInterrupt(),
                130,
                "interrupted. Run the same command again to go on from the last stage.",
            ),
            (
                OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
                1,
                (
                    "[Errno 28] No space left on device: '/tmp/x'. "
                    "Repair that, then run the same command again."
                ),
            ),
            (
                MemoryError(),
                1,
                "report: out of memory. Use a machine with more memory.",
            ),
            (
                ModuleNotFoundError("No module named 'torch'"),
                1,
                "No module named 'torch'. `treeq-export doctor` says how to install it.",
            ),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
    )
    def test_one_line_and_a_status(
        self,
        run: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        status: int,
        line: str,
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(pipeline, "run_stage", fail)
        result = call("report", "--run", run)
        assert result.exit_code == status
        assert result.stdout == ""
        assert result.stderr == f"report     ...\ntreeq-export: {line}\n"

    def test_a_defect_is_not_hidden(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise ValueError("defect")

        monkeypatch.setattr(pipeline, "run_stage", fail)
        assert isinstance(call("report", "--run", run).exception, ValueError)


class TestRun:
    def test_unchanged_second_run_writes_only_the_report(self, run: Path, run_recipe: Path) -> None:
        before = json.loads((run / "run.json").read_text())["stages"]
        result = call("run", run_recipe, "--out", run, "--json")
        assert result.exit_code == 0
        assert result.stderr.splitlines() == [
            *(f"{name:<10} up to date" for name in STAGE_NAMES[:-1]),
            "report     ...",
        ]
        assert result.stdout == (run / "report.json").read_text()
        assert json.loads(result.stdout)["model"]["name"] == "tiny"
        after = json.loads((run / "run.json").read_text())["stages"]
        del before["report"], after["report"]
        assert after == before

    def test_terminal_report(self, run: Path, run_recipe: Path) -> None:
        result = call("run", run_recipe, "--out", run)
        assert result.exit_code == 0
        assert "quantized layers" in result.stdout
        assert "All 8 gates passed" in result.stdout

    def test_overrides_are_recorded(self, run: Path, run_recipe: Path) -> None:
        args = ["--set", "validate.batch_size=1", "--set", "evaluate.seeds=[1]"]
        assert call("run", run_recipe, "--out", run, *args).exit_code == 0
        record = json.loads((run / "run.json").read_text())
        assert record["overrides"] == ["validate.batch_size=1", "evaluate.seeds=[1]"]
        assert record["recipe"]["evaluate"]["seeds"] == [1]
        assert json.loads((run / "report.json").read_text())["quality"]["seed"] == 1
        assert "--set validate.batch_size=1" in (run / "report.html").read_text()

    def test_changed_bench_section(
        self, run: Path, run_recipe: Path, no_memory_processes: None
    ) -> None:
        result = call("run", run_recipe, "--out", run, "--set", "bench.rounds=4", "--json")
        assert result.exit_code == 0
        work = [line.split()[0] for line in result.stderr.splitlines() if line.endswith("...")]
        assert work == ["bench", "report"]
        rows = json.loads(result.stdout)["bench"]["rows"]
        assert [len(row["all_times_ms"]) for row in rows] == [4] * 5

    def test_from_a_stage(self, run: Path, run_recipe: Path) -> None:
        result = call("run", run_recipe, "--out", run, "--from", "evaluate")
        assert result.exit_code == 0
        work = [line.split()[0] for line in result.stderr.splitlines() if line.endswith("...")]
        assert work == ["evaluate", "report"]

    def test_unmet_gate_is_status_3_after_the_report(self, run: Path, run_recipe: Path) -> None:
        (run / "report.json").unlink()
        result = call("run", run_recipe, "--out", run, "--set", UNREACHABLE, "--json")
        assert result.exit_code == 3
        assert result.stdout == (run / "report.json").read_text()
        assert json.loads(result.stdout)["parity"]["ort"]["passed"] is False
        assert result.stderr.splitlines()[-1].startswith(
            "treeq-export: 2 of 8 gates are not met: ort: end-to-end sqnr_db: measured "
        )
        assert result.stderr.endswith("required at least 1000.\n")
        again = call("run", run_recipe, "--out", run, "--set", UNREACHABLE)
        assert again.exit_code == 3
        assert "validate   up to date" in again.stderr


class TestStageCommands:
    @pytest.mark.parametrize(
        ("command", "file"),
        [
            ("search", "plan.json"),
            ("calibrate", "calibration.json"),
            ("finetune", "finetune.json"),
            ("compile", "compile.json"),
            ("validate", "parity.json"),
            ("bench", "bench.json"),
            ("evaluate", "quality.json"),
            ("report", "report.json"),
        ],
    )
    def test_json_is_the_record(
        self, run: Path, no_memory_processes: None, command: str, file: str
    ) -> None:
        before = (run / file).read_text()
        result = call(command, "--run", run, "--json")
        assert result.exit_code == 0, result.stderr
        assert result.stdout == (run / file).read_text()
        assert result.stderr == f"{command:<10} ...\n"
        record = json.loads(result.stdout)
        if command == "search":
            assert record["tensors_sha256"] is None
        elif command not in ("finetune", "bench", "report"):  # these hold times
            assert result.stdout == before

    @pytest.mark.parametrize("command", ["search", "calibrate", "validate"])
    def test_says_what_it_wrote(self, run: Path, command: str) -> None:
        result = call(command, "--run", run)
        assert result.exit_code == 0
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith(f"wrote {run}")

    def test_report_on_the_terminal(self, run: Path) -> None:
        (run / "bench.json").unlink()
        result = call("report", "--run", run)
        assert result.exit_code == 0
        assert "quantized layers" in result.stdout
        assert json.loads((run / "report.json").read_text())["bench"] is None

    def test_a_new_run_stage_by_stage(self, run_recipe: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        searched = call(
            "search", "--run", run, "--recipe", run_recipe, "--set", "search.weight_bits=3"
        )
        assert searched.exit_code == 0
        assert load_plan(run).average_weight_bits == 3.0
        assert call("calibrate", "--run", run).exit_code == 0
        assert load_plan(run).tensors_sha256 is not None
        assert call("finetune", "--run", run).exit_code == 0
        skipped = call("validate", "--run", run)
        assert skipped.exit_code == 1
        assert skipped.stderr.endswith(f"Run `treeq-export compile --run {run}` first.\n")

    @pytest.mark.parametrize("flags", [[], ["--json"]])
    def test_finetuning_may_be_left_out(self, run: Path, flags: list[str]) -> None:
        record = json.loads((run / "run.json").read_text())
        record["recipe"]["finetune"]["mode"] = "none"
        (run / "run.json").write_text(json.dumps(record))
        result = call("finetune", "--run", run, *flags)
        assert result.exit_code == 0
        assert result.stdout == ("null\n" if flags else "")
        assert ("nothing was trained" in result.stderr) is not bool(flags)
        assert not (run / "finetune.json").exists()

    def test_searching_again_makes_the_rest_out_of_date(self, run: Path) -> None:
        assert call("search", "--run", run).exit_code == 0
        result = call("bench", "--run", run)
        assert result.exit_code == 1
        assert "bench needs the result of calibrate, which is not there yet." in result.stderr
        assert not (run / "bench.json").exists()

    def test_evaluate_the_reference_itself(self, run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        record["recipe"]["evaluate"]["runner"] = "torch"
        (run / "run.json").write_text(json.dumps(record))
        result = call("evaluate", "--run", run, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["runner"] == "torch"

    @pytest.mark.parametrize(
        ("command", "section", "gates"),
        [
            ("validate", "validate", {"min_end_to_end_sqnr_db": 1000.0}),
            ("evaluate", "evaluate", {"min_psnr_db": 1000.0}),
        ],
    )
    def test_unmet_gate(self, run: Path, command: str, section: str, gates: Any) -> None:
        record = json.loads((run / "run.json").read_text())
        record["recipe"][section]["gates"] |= gates
        (run / "run.json").write_text(json.dumps(record))
        result = call(command, "--run", run, "--json")
        assert result.exit_code == 3
        assert json.loads(result.stdout)
        assert "required at least 1000." in result.stderr.splitlines()[-1]


class TestInspect:
    def test_schema(self) -> None:
        result = call("inspect", "--schema")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == json_schema()

    def test_run(self, finished_run: Path) -> None:
        result = call("inspect", "--run", finished_run)
        assert result.exit_code == 0
        lines = [line for line in result.stdout.splitlines() if "transformer_blocks.0" in line]
        assert len(lines) == 7
        assert "4 bit" in lines[0]
        assert "4 token_rms" in lines[0]
        assert "1x1 r4" in lines[0]

    def test_run_with_groups_and_without_branches(self, run_recipe: Path, tmp_path: Path) -> None:
        settings = ["search.group_size=32", "search.branch=null", "search.activation_bits=null"]
        args = [word for setting in settings for word in ("--set", setting)]
        call("search", "--run", tmp_path / "run", "--recipe", run_recipe, *args)
        result = call("inspect", "--run", tmp_path / "run")
        lines = [line for line in result.stdout.splitlines() if "transformer_blocks.0" in line]
        assert len(lines) == 7
        assert "4 bit / 32" in lines[0]
        assert "float none" in lines[0]
        assert "- " in lines[0]

    def test_run_as_json(self, finished_run: Path) -> None:
        result = call("inspect", "--run", finished_run, "--json")
        assert result.stdout == plan_to_json(load_plan(finished_run))

    @pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
    def test_checkpoint(self, tiny_checkpoints: Path, family: str) -> None:
        result = call("inspect", "--checkpoint", tiny_checkpoints / family, "--json")
        assert result.exit_code == 0, result.stderr
        layers = json.loads(result.stdout)
        assert set(layers[0]) == {
            "name",
            "in_features",
            "out_features",
            "has_bias",
            "block",
            "position",
            "leaf",
        }
        table = call("inspect", "--checkpoint", tiny_checkpoints / family)
        assert f"{len(layers)} layers" in table.stdout
        assert all(layer["name"] in table.stdout for layer in layers)


class TestProgress:
    @pytest.fixture
    def terminal(self, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
        """What a terminal would receive on stderr."""
        text = io.StringIO()
        monkeypatch.setattr(console, "stderr", Console(file=text, force_terminal=True, width=120))
        return text

    def test_a_bar_per_stage_with_an_estimate(
        self, run: Path, run_recipe: Path, terminal: io.StringIO
    ) -> None:
        result = call("run", run_recipe, "--out", run, "--from", "evaluate")
        assert result.exit_code == 0
        text = terminal.getvalue()
        assert "bench      up to date" in text
        assert "evaluate" in text
        assert "100%" in text
        assert "left" in text
        assert "evaluate   ..." not in text

    def test_verbose_logs_to_stderr(
        self, run: Path, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings: dict[str, Any] = {}
        monkeypatch.setattr(console.logging, "basicConfig", lambda **given: settings.update(given))
        result = call("--verbose", "inspect", "--run", run, "--json")
        assert result.exit_code == 0
        assert settings["level"] == console.logging.INFO
        assert settings["handlers"][0].console is console.stderr
        json.loads(result.stdout)
