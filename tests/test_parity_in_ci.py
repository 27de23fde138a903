"""What a user's own CI makes of parity: JUnit XML, and a comparison with another run."""

import json
import math
import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from treeq_export.cli import main
from treeq_export.errors import OutputError, PlanError
from treeq_export.recipe import ParityGates
from treeq_export.records import (
    GateResult,
    LayerParity,
    ParityRecord,
    TargetParity,
    load_record,
    save_record,
)
from treeq_export.validate.growth import describe_faults, find_growth, load_earlier
from treeq_export.validate.junit import NETWORK, write_junit

DOCS = Path(__file__).parents[1] / "docs"
# Elements of JUnit XML: their attributes, and what may be in them.
SCHEMA: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped"},
        {"properties", "testcase"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"classname", "name"}, {"failure"}),
    "failure": ({"type", "message"}, set()),
}


def make_layer(name: str, sqnr_db: float = 90.0, **fields: Any) -> LayerParity:
    values = {
        "max_abs_error": 0.5,
        "equal_code_fraction": 1.0,
        "accumulators_equal": True,
        "propagated_sqnr_db": 80.0,
        "quantization_sqnr_db": 20.0,
    }
    return LayerParity(name=name, sqnr_db=sqnr_db, **values | fields)


def make_target(name: str, *layers: LayerParity, sqnr_db: float = 60.0) -> TargetParity:
    gate = GateResult.of(f"{name}: end-to-end sqnr_db", sqnr_db, 40.0, at_least=True)
    return TargetParity(
        target=name,
        passed=gate.passed,
        sqnr_db=sqnr_db,
        max_abs_error=0.25,
        layers=list(layers),
        gates=[gate],
    )


def make_record(*targets: TargetParity) -> ParityRecord:
    return ParityRecord(batch_size=2, seed=5, targets=list(targets))


def check_schema(element: ET.Element) -> None:
    """Check names, attributes, order and counts of an element and of all below it."""
    attributes, children = SCHEMA[element.tag]
    assert set(element.keys()) == attributes
    assert {child.tag for child in element} <= children
    for child in element:
        check_schema(child)
    if "tests" in attributes:
        assert int(element.get("tests", "")) == len(list(element.iter("testcase")))
        assert int(element.get("failures", "")) == len(list(element.iter("failure")))
        assert element.get("errors") == "0"
    if element.tag == "testsuite":
        assert next(iter(element)).tag == "properties"


def read_junit(path: Path) -> dict[tuple[str, str], ET.Element | None]:
    """Return the failure of every test case, None where it passed."""
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    check_schema(root)
    cases = list(root.iter("testcase"))
    found = {
        (case.get("classname", ""), case.get("name", "")): case.find("failure") for case in cases
    }
    assert len(found) == len(cases)
    return found


class TestJunit:
    def test_every_layer_and_the_network_is_a_case(self, tmp_path: Path):
        record = make_record(
            make_target("ort", make_layer("a"), make_layer("b")),
            make_target("ort_body", make_layer("a"), make_layer("b")),
        )
        write_junit(tmp_path / "parity.xml", record, ParityGates(), {})
        cases = read_junit(tmp_path / "parity.xml")
        assert list(cases) == [
            (target, case) for target in ("ort", "ort_body") for case in (NETWORK, "a", "b")
        ]
        assert set(cases.values()) == {None}
        suites = ET.parse(tmp_path / "parity.xml").getroot()
        assert [suite.get("name") for suite in suites] == [
            "ort: ONNX Runtime CPU",
            "ort_body: ONNX Runtime CPU",
        ]
        properties = {p.get("name"): p.get("value") for p in suites[0].iter("property")}
        assert properties == {"batch_size": "2", "seed": "5"}

    def test_failures_carry_the_numbers(self, tmp_path: Path):
        bad = make_layer("b", 38.04, equal_code_fraction=0.9, accumulators_equal=False)
        record = make_record(make_target("ort", make_layer("a"), bad, sqnr_db=math.nan))
        write_junit(
            tmp_path / "parity.xml", record, ParityGates(), {("ort", "a"): ["it has grown"]}
        )
        cases = read_junit(tmp_path / "parity.xml")
        layer, network = cases["ort", "b"], cases["ort", NETWORK]
        assert layer is not None
        assert layer.get("message") == (
            "own sqnr 38.0 dB < 40 dB; equal codes 0.900000 < 0.999; "
            "int32 sums differ for equal codes"
        )
        assert (layer.text or "").splitlines() == [
            "sqnr_db: 38.04",
            "max_abs_error: 0.5",
            "equal_code_fraction: 0.9",
            "accumulators_equal: False",
            "propagated_sqnr_db: 80.0",
            "quantization_sqnr_db: 20.0",
        ]
        assert network is not None
        assert network.get("message") == "ort: end-to-end sqnr_db: nan < 40"
        assert "max_abs_error: 0.25" in (network.text or "")
        layer = cases["ort", "a"]
        assert layer is not None
        assert layer.get("message") == "it has grown"

    def test_names_that_xml_cannot_hold(self, tmp_path: Path):
        record = make_record(make_target("ort", make_layer('<b>&"\x00\x1b\ufffe'), make_layer("ü")))
        write_junit(tmp_path / "parity.xml", record, ParityGates(), {})
        names = [name for _, name in read_junit(tmp_path / "parity.xml")]
        assert names == [NETWORK, '<b>&"\\x00\\x1b\\ufffe', "ü"]

    def test_a_file_that_cannot_be_written_stays(self, tmp_path: Path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(OutputError) as caught:
            write_junit(tmp_path / "folder", make_record(), ParityGates(), {})
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestGrowth:
    def find(self, now: ParityRecord, before: ParityRecord, max_growth: float = 0.1) -> list[str]:
        growth = find_growth(now, before, max_growth)
        return growth.missing + describe_faults(growth)

    def test_equal_runs_have_none(self):
        record = make_record(make_target("ort", make_layer("a"), make_layer("b", math.nan)))
        assert self.find(record, record, 0.0) == []

    @pytest.mark.parametrize(("share", "found"), [(0.99, True), (1.01, False)])
    def test_the_share_decides(self, share: float, found: bool):
        """6.02 dB less is twice the error."""
        before = make_record(make_target("ort", make_layer("a", 60.0), sqnr_db=50.0))
        now = make_record(make_target("ort", make_layer("a", 53.98), sqnr_db=50.0))
        lines = self.find(now, before, share)
        assert bool(lines) == found
        if found:
            [line] = lines
            assert line == (
                "ort: a: own error has grown by 100.0%, from 60.00 dB to 53.98 dB; "
                "at most 99.0% is allowed"
            )
        assert self.find(before, now, 0.0) == []

    def test_the_network_and_what_quantization_costs(self):
        before = make_record(make_target("ort", make_layer("a", quantization_sqnr_db=20.0)))
        now = make_record(
            make_target("ort", make_layer("a", quantization_sqnr_db=14.0), sqnr_db=41.0)
        )
        network, layer = self.find(now, before)
        assert network.startswith("ort: network: end-to-end error has grown by 791.3%, from 60.00")
        assert layer.startswith("ort: a: quantization error has grown by 99.5%, from 20.00 dB")

    def test_rounding_is_no_growth(self):
        before = make_record(make_target("ort", make_layer("a", math.inf)))
        for sqnr, grown in ((100.0, False), (120.0, False), (99.0, True)):
            now = make_record(make_target("ort", make_layer("a", sqnr)))
            assert bool(self.find(now, before)) == grown

    def test_nan_is_growth(self):
        before = make_record(make_target("ort", make_layer("a")))
        now = make_record(make_target("ort", make_layer("a", math.nan)))
        [line] = self.find(now, before, 1e9)
        assert line.startswith("ort: a: own error has grown by nan%, from 90.00 dB to nan dB")
        assert self.find(before, now) == []

    def test_what_only_one_run_has_is_said_and_no_fault(self):
        before = make_record(make_target("ort", make_layer("a"), make_layer("b")))
        now = make_record(
            make_target("ort", make_layer("a"), make_layer("c")), make_target("portable")
        )
        growth = find_growth(now, before, 0.1)
        assert growth.faults == {}
        assert growth.missing == [
            "ort: b: only in the other run",
            "ort: c: not in the other run",
            "portable: network: not in the other run",
        ]

    def test_other_inputs_are_an_error(self, tmp_path: Path):
        save_record(tmp_path / "parity.json", make_record(make_target("ort")))
        assert load_earlier(tmp_path, 2, 5).targets[0].target == "ort"
        for batch_size, seed, named in ((3, 5, "batch_size 2, expected 3"), (2, 4, "seed 5")):
            with pytest.raises(PlanError, match=named) as caught:
                load_earlier(tmp_path, batch_size, seed)
            assert str(caught.value).startswith(f"{tmp_path / 'parity.json'}: received ")
        with pytest.raises(PlanError, match=r"parity\.json: missing\. Run `treeq-export validate"):
            load_earlier(tmp_path / "nowhere", 2, 5)


class TestCommand:
    @pytest.fixture
    def run(self, finished_run: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(finished_run, tmp_path / "run"))

    def call(self, run: Path, *arguments: object) -> Any:
        command = ["validate", "--run", str(run), *map(str, arguments)]
        return CliRunner().invoke(main, command)

    def spoil(self, run: Path) -> str:
        """Halve one layer's error in a run's record; return the layer."""
        record = json.loads((run / "parity.json").read_text())
        layer = record["targets"][0]["layers"][1]
        layer["quantization_sqnr_db"] += 6.1
        (run / "parity.json").write_text(json.dumps(record))
        return layer["name"]

    def test_junit_and_an_equal_run(self, run: Path, finished_run: Path, tmp_path: Path):
        junit = tmp_path / "parity.xml"
        result = self.call(run, "--junit", junit, "--against", finished_run, "--max-growth", 0)
        assert result.exit_code == 0, result.output
        record = load_record(run / "parity.json", ParityRecord, "validate")
        cases = read_junit(junit)
        assert len(cases) == sum(1 + len(target.layers) for target in record.targets)
        assert set(cases.values()) == {None}

    def test_growth_is_status_3_and_a_failure(self, run: Path, finished_run: Path, tmp_path: Path):
        other = Path(shutil.copytree(finished_run, tmp_path / "other"))
        layer, junit = self.spoil(other), tmp_path / "parity.xml"
        result = self.call(run, "--junit", junit, "--against", other)
        assert result.exit_code == 3
        [line] = [line for line in result.stderr.splitlines() if layer in line]
        assert re.search(r": quantization error has grown by 10[12]\.\d%, from ", line)
        last = result.stderr.splitlines()[-1]
        assert last.startswith("treeq-export: 1 layers or networks have errors that grew by more")
        failed = [name for name, failure in read_junit(junit).items() if failure is not None]
        assert [name for _, name in failed] == [layer]
        assert self.call(run, "--against", other, "--max-growth", 1.1).exit_code == 0

    def test_gates_fail_in_junit_too(self, run: Path, tmp_path: Path):
        record = json.loads((run / "run.json").read_text())
        record["recipe"]["validate"]["gates"]["min_layer_sqnr_db"] = 1000.0
        (run / "run.json").write_text(json.dumps(record))
        result = self.call(run, "--junit", tmp_path / "parity.xml")
        assert result.exit_code == 3
        failures = read_junit(tmp_path / "parity.xml")
        assert {name for (_, name), failure in failures.items() if failure is None} == {NETWORK}

    def test_another_run_that_is_not_there_stops_before_the_work(self, run: Path, tmp_path: Path):
        before = (run / "parity.json").stat().st_mtime_ns
        result = self.call(run, "--against", tmp_path / "nowhere")
        assert result.exit_code == 1
        assert "nowhere/parity.json: missing" in result.stderr
        assert (run / "parity.json").stat().st_mtime_ns == before
        for share in (-1, "nan"):
            assert self.call(run, "--max-growth", share).exit_code == 2


PAGE = (DOCS / "ci.md").read_text()
WORKFLOWS = re.findall(r"```yaml\n(# \S+\n.*?)```", PAGE, re.DOTALL)


def scripts_of(workflow: dict[str, Any]) -> list[str]:
    """Return the shell lines of a workflow of GitHub or GitLab."""
    if "jobs" in workflow:
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        return [line for step in steps for line in step.get("run", "").splitlines()]
    jobs = [job for job in workflow.values() if isinstance(job, dict) and "script" in job]
    return [line for job in jobs for line in job["script"]]


class TestPage:
    @pytest.fixture(params=WORKFLOWS, ids=lambda text: text.split()[1])
    def workflow(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return yaml.safe_load(request.param)

    def test_it_has_one_for_github_and_one_for_gitlab(self):
        names = [text.split()[1] for text in WORKFLOWS]
        assert names == [".github/workflows/parity.yml", ".gitlab-ci.yml"]

    def test_commands_parse(self, workflow: dict[str, Any]):
        """Every command exists, and takes the options that it is given."""
        commands = [line for line in scripts_of(workflow) if line.startswith("treeq-export ")]
        assert len(commands) >= 2
        for line in commands:
            _, name, *arguments = shlex.split(line)
            command = main.commands[name]
            context = command.make_context(name, [*arguments], resilient_parsing=False)
            assert isinstance(context, click.Context)
        assert any("--junit" in line and "--against" in line for line in commands)

    def test_results_are_kept_when_the_command_fails(self, workflow: dict[str, Any]):
        junit = next(
            shlex.split(line)[shlex.split(line).index("--junit") + 1]
            for line in scripts_of(workflow)
            if "--junit" in line
        )
        if "jobs" in workflow:
            [job] = workflow["jobs"].values()
            [upload] = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
            assert upload["if"] == "always()"
            assert junit in upload["with"]["path"].split()
        else:
            [job] = [job for job in workflow.values() if "script" in job]
            assert job["artifacts"]["when"] == "always"
            assert job["artifacts"]["reports"]["junit"] == junit

    def test_validate_runs_as_written(
        self,
        workflow: dict[str, Any],
        finished_run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.chdir(tmp_path)
        [line] = [line for line in scripts_of(workflow) if " validate " in line]
        words = shlex.split(line)
        for option in ("--run", "--against"):
            shutil.copytree(finished_run, words[words.index(option) + 1])
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, result.output
        assert read_junit(Path(words[words.index("--junit") + 1]))
