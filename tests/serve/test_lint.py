"""The lint as a whole: what it returns, raises and prints; and what a real server says to it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.serve.lint_repositories import (
    CPU,
    DENOISER,
    FINAL_ROOT,
    GRAPH,
    LIBRARY,
    SAMPLER,
    VAE,
    VAE_WARMUP,
    WARMUP_VALUE,
    Edit,
    add,
    write_repository,
)
from treeq_export.cli import main
from treeq_export.errors import ServeError
from treeq_export.serve.lint import Finding, check_repository, lint_repository
from treeq_export.serve.lint.read import is_file

NO_LIBRARY: Edit = ("denoiser", LIBRARY, "")
BAD_DIMS: Edit = (VAE, "[16, 16, 3]", "[16, 0, 3]")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["lint", *map(str, arguments)])


def test_paths_below_the_final_root_are_looked_up_below_the_root(tmp_path: Path) -> None:
    write_repository(tmp_path)
    assert lint_repository(tmp_path, FINAL_ROOT) == []
    found = lint_repository(tmp_path)
    assert [(finding.path, finding.rule) for finding in found] == [
        (Path(DENOISER), "op-library"),
        (Path(CPU), "op-library"),
    ]
    here = tmp_path / "denoiser" / "lib" / "libtreeq_ort.so"
    assert f'Write "{here}".' in found[0].message


@pytest.mark.parametrize("name", ["x y", "x'y", "x$y", "x;y", 'x"y', "x\\y", "x\ny", "x(y)", "x*"])
def test_a_path_that_the_python_backend_cannot_have(tmp_path: Path, name: str) -> None:
    root = write_repository(tmp_path / name, [NO_LIBRARY])
    (finding,) = (each for each in lint_repository(root) if each.rule == "path-is-fit")
    assert finding.path == Path()
    assert "which Triton's Python backend cannot have in a path. Move" in finding.message
    assert "\n" not in finding.message
    assert run(root).exit_code == 1
    here = write_repository(tmp_path / "fit", [NO_LIBRARY])
    assert {each.rule for each in lint_repository(here, root)} == {"path-is-fit"}
    assert lint_repository(root, here) == []


@pytest.mark.parametrize("name", ["x-y_z.1", "grüße", "a,b:c=d@e%f+g~h^i"])
def test_a_path_that_it_can_have(tmp_path: Path, name: str) -> None:
    assert lint_repository(write_repository(tmp_path / name, [NO_LIBRARY])) == []


def test_a_library_of_another_copy(tmp_path: Path) -> None:
    first = write_repository(tmp_path / "first")
    library = first / "denoiser" / "lib" / "libtreeq_ort.so"
    there: Edit = ("denoiser", str(FINAL_ROOT / "denoiser/lib/libtreeq_ort.so"), str(library))
    assert lint_repository(write_repository(tmp_path / "first", [there])) == []
    found = lint_repository(write_repository(tmp_path / "second", [there]))
    assert {each.rule for each in found} == {"op-library"}
    assert "in another copy of this repository" in found[0].message


def test_a_finding_about_a_file_is_made_once(tmp_path: Path) -> None:
    found = lint_repository(write_repository(tmp_path, [(GRAPH, None, None)]), FINAL_ROOT)
    assert [(finding.path, finding.rule) for finding in found] == [(Path(GRAPH), "model-file")]


def test_check_names_the_first_finding_and_counts_the_others(tmp_path: Path) -> None:
    check_repository(write_repository(tmp_path), FINAL_ROOT)
    write_repository(tmp_path, [(VAE, "max_batch_size: 4", "")])
    with pytest.raises(ServeError) as caught:
        check_repository(tmp_path, FINAL_ROOT)
    assert str(caught.value).startswith(f"{tmp_path / VAE}: max-batch: max_batch_size: rec")
    assert "more" not in str(caught.value).split("1 or more")[-1]
    write_repository(tmp_path, [(VAE, "max_batch_size: 4", ""), (SAMPLER, '"bls"', '"x"')])
    with pytest.raises(ServeError, match=re.escape(f"(1 more: `treeq-export lint {tmp_path}` li")):
        check_repository(tmp_path, FINAL_ROOT)


@pytest.mark.parametrize(
    ("folder", "words"), [("none", "no such folder"), (".", "received no folder with a config")]
)
def test_no_repository_is_an_error(tmp_path: Path, folder: str, words: str) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ServeError, match=words):
        lint_repository(tmp_path / folder)


def test_tritonclient_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    with pytest.raises(ServeError, match=r"pip install 'treeq-export\[serve\]'"):
        lint_repository(write_repository(tmp_path))


def test_command_says_that_all_is_right(tmp_path: Path) -> None:
    write_repository(tmp_path, [NO_LIBRARY])
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (0, "4 models, no findings\n")
    result = run(tmp_path, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])


def test_command_lists_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    write_repository(tmp_path, [NO_LIBRARY, BAD_DIMS, (GRAPH, None, None)])
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stderr == (
        f"treeq-export: {tmp_path}: 2 findings in 2 files, expected none. Do what the messages "
        "say, then run the same command again.\n"
    )
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:2] for row in rows if row and "/" in row[0]] == [
        [GRAPH, "model-file"],
        [VAE, "tensors-are-stated"],
    ]
    assert "received dims [16, 0, 3]," in result.stdout
    as_json = json.loads(run(tmp_path, "--json").stdout)
    assert [Finding(Path(row.pop("path")), **row) for row in as_json] == lint_repository(tmp_path)


# What Python models of the test do: zeros of the shapes and types that their configurations state,
# and, in the sampler, one call of the denoiser with what lint says that a bls sampler passes.
ZEROS = """
import json
import numpy as np
import triton_python_backend_utils as utils

class TritonPythonModel:
    def initialize(self, args):
        self.outputs = json.loads(args["model_config"])["output"]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        num = request.inputs()[0].as_numpy().shape[0]
        return utils.InferenceResponse([
            utils.Tensor(output["name"], np.zeros([num, *map(int, output["dims"])],
                         utils.triton_string_to_numpy(output["data_type"])))
            for output in self.outputs
        ])
"""
CALL = """
    def execute(self, requests):
        for request in requests:
            label = utils.get_input_tensor_by_name(request, "label").as_numpy()
            arrays = {
                "sample": np.zeros((len(label), 4, 2, 2), np.float32),
                "timestep": np.zeros((len(label), 1), np.float32),
                "class_labels": label.astype(np.int64),
            }
            answer = utils.InferenceRequest(
                model_name="denoiser",
                inputs=[utils.Tensor(name, array) for name, array in arrays.items()],
                requested_output_names=["prediction"],
            ).exec()
            if answer.has_error():
                raise utils.TritonModelException(answer.error().message())
        return [self.answer(request) for request in requests]
"""
LAUNCH = """#!/bin/sh
exec "$TRITONSERVER" --model-repository="${0%/*}" --backend-directory="$TRITON_BACKENDS" \\
  --model-control-mode=explicit --http-address=127.0.0.1 --http-port="$HTTP_PORT" \\
  --grpc-address=127.0.0.1 --grpc-port="$GRPC_PORT" \\
  --metrics-address=127.0.0.1 --metrics-port="$METRICS_PORT" "$@"
"""
ALL_PYTHON: list[Edit] = [
    NO_LIBRARY,
    ("denoiser", 'platform: "onnxruntime_onnx"', 'backend: "python"'),
    (DENOISER, "KIND_GPU", "KIND_CPU"),
    ("denoiser/1", None, None),
    ("denoiser/1/model.py", None, ZEROS),
    ("sampler/1/model.py", None, ZEROS + CALL),
    ("vae_decoder/1/model.py", None, ZEROS),
]
# Rule, edit of the decoder's configuration, whether the server loads it nevertheless.
SERVER_SAYS: list[tuple[str, Edit, bool]] = [
    ("schema", add("max_queue_delay: 3"), False),
    ("name-is-folder", (VAE, 'name: "vae_decoder"', 'name: "vae"'), False),
    ("tensors-are-stated", BAD_DIMS, False),
    ("warmup-inputs", add("model_warmup { batch_size: 1 }"), False),
    ("warmup-values", add(VAE_WARMUP % WARMUP_VALUE.replace("[4", "[1, 4")), False),
    ("op-library", add('model_operations { op_library_filename: "/none.so" }'), True),
]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, server_python: Path, local_triton: ModuleType
) -> Iterator[tuple[Path, Any]]:
    """The repository in Python alone, and a client of a real server that has loaded nothing."""
    root = write_repository(tmp_path_factory.mktemp("lint"), ALL_PYTHON)
    (root / "launch.sh").write_text(LAUNCH)
    (root / "launch.sh").chmod(0o755)
    import tritonclient.http as triton

    with (
        local_triton.serve(root, server_python) as server,
        triton.InferenceServerClient(server.http, network_timeout=30) as client,
    ):
        yield root, client


@pytest.mark.triton
@pytest.mark.slow
def test_server_loads_what_lint_passes(served: tuple[Path, Any]) -> None:
    import tritonclient.http as triton

    root, client = served
    assert lint_repository(root) == []
    for model in ("denoiser", "vae_decoder", "sampler"):
        client.load_model(model)
    inputs = []
    for name, data_type, dtype in (("label", "INT32", np.int32), ("seed", "INT64", np.int64)):
        tensor = triton.InferInput(name, [2, 1], data_type)
        tensor.set_data_from_numpy(np.zeros((2, 1), dtype))
        inputs.append(tensor)
    answer = client.infer("sampler", inputs)
    assert {name: answer.as_numpy(name).shape for name in ("latents", "image", "step")} == {
        "latents": (2, 4, 2, 2),
        "image": (2, 16, 16, 3),
        "step": (2, 1),
    }


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "edit", "loads"),
    SERVER_SAYS,
    ids=[f"{rule}: {edit[2]}" for rule, edit, _ in SERVER_SAYS],
)
def test_server_refuses_it_or_does_not_notice(
    served: tuple[Path, Any], rule: str, edit: Edit, loads: bool
) -> None:
    from tritonclient.utils import InferenceServerException

    root, client = served
    write_repository(root, [*ALL_PYTHON, edit])
    assert rule in {finding.rule for finding in lint_repository(root)}
    if loads:
        client.load_model("vae_decoder")
        return
    with pytest.raises(InferenceServerException, match="failed"):
        client.load_model("vae_decoder")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "missing"])
def test_a_name_that_no_file_system_takes_is_no_file(tmp_path: Path, name: str) -> None:
    assert not is_file(tmp_path / name)
