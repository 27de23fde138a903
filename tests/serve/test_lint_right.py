"""What the lint has nothing to say about; each was tried with a real server, or read in its source.

Those of ONNX Runtime's and TensorRT's backends were read.
"""

from pathlib import Path

import pytest

from tests.serve.lint_repositories import (
    BATCHING,
    DATA,
    DENOISER,
    ENGINE,
    ENSEMBLE,
    FILES,
    FINAL_ROOT,
    GRAPH,
    LABELS_INPUT,
    LIBRARY,
    MANIFEST,
    NUM_CLASSES,
    PYTHON,
    SAMPLER,
    STEP_OUTPUT,
    VAE,
    WARMUP_LABELS,
    Edit,
    add,
    make_graph,
    parameter,
    write_repository,
)
from treeq_export.serve.lint import lint_repository

GROUP = "instance_group"
ONLY_VAE: list[Edit] = [(name, None, None) for name in ("denoiser", "sampler", "pipeline")]
SAMPLER_ALONE: list[Edit] = [("denoiser", None, None), (SAMPLER, '"bls"', '"inprocess"')]


def environment(path: str) -> Edit:
    return add(parameter("EXECUTION_ENV_PATH", path))


def before_output(model: str, text: str) -> Edit:
    """Return an edit that adds an input, or an output, before the first output."""
    return model, "output {", f"{text}\noutput {{"


def zeros(name: str, data_type: str, dims: str = "1") -> str:
    """Return an input of a warmup sample."""
    value = f"{{ data_type: {data_type} dims: {dims} zero_data: true }}"
    return f'inputs {{ key: "{name}" value {value} }}\n'


RIGHT: dict[str, list[Edit]] = {
    "as it is": [],
    "no manifest": [(MANIFEST, None, None)],
    "a manifest without a profile": [(MANIFEST, None, "{}")],
    "a backend and its platform": [("denoiser", "platform:", 'backend: "onnxruntime" platform:')],
    "a backend's own platform": [(VAE, 'backend: "python"', 'backend: "python" platform: "any"')],
    "all that text format allows": [
        (VAE, 'backend: "python"', "backend: 'pyt' \"hon\"; # comment"),
        (VAE, "max_batch_size: 4", "max_batch_size: 0x4,"),
        (VAE, "output {", "output: <"),
        (VAE, "[16, 16, 3] }", "[16, 16, 3] >"),
    ],
    "one name of an input and an output": [
        before_output(VAE, 'output { name: "latents" data_type: TYPE_FP16 dims: -1 }')
    ],
    "reshape around a free dimension": [
        (VAE, "dims: [4, 2, 2]", "dims: [2, -1, 6] reshape { shape: [2, 1, -1, 2, 3] }"),
        (ENSEMBLE, "[4, -1, 2]", "[2, -1, 6]"),
    ],
    "an optional input that is not warmed up": [
        before_output(VAE, 'input { name: "q" data_type: TYPE_INT32 dims: 1 optional: true }'),
        add(
            'model_warmup { batch_size: 4 inputs { key: "latents" value '
            "{ data_type: TYPE_FP32 dims: [4, 2, 2] random_data: true } } }"
        ),
    ],
    "strings of a model that is not ours": [
        *ONLY_VAE,
        ("vae_decoder", None, None),
        (
            "tokenizer/config.pbtxt",
            None,
            (
                'name: "tokenizer" backend: "python" max_batch_size: 1\n'
                'input { name: "text" data_type: TYPE_STRING dims: 1 }\n'
                'output { name: "ids" data_type: TYPE_INT64 dims: -1 }\n'
            ),
        ),
        ("tokenizer/1/model.py", None, "from of_mine import *"),
    ],
    "channels first": [("denoiser", "2, 2] }\ninput", "2, 2] format: FORMAT_NCHW }\ninput")],
    "all versions": [
        add("version_policy { all { } }"),
        ("vae_decoder/3/model.py", None, PYTHON),
    ],
    "a specific version": [
        add("version_policy { specific { versions: [3] } }"),
        ("vae_decoder/3/model.py", None, PYTHON),
        ("vae_decoder/1/model.py", None, None),
    ],
    "a copy that is not served": [
        add("version_policy { specific { versions: 1 } }"),
        ("vae_decoder/2.bak/model.py", None, PYTHON),
    ],
    "an empty version policy": [add("version_policy { }")],
    "version 0": [("vae_decoder/0/model.py", None, PYTHON), ("vae_decoder/1", None, None)],
    "copies beside a version": [
        (f"vae_decoder/{name}/x", None, "")
        for name in ("1.bak", "01", "v1", ".1.tmp", "old", "0.5", "-3")
    ],
    "a broken version that is not served": [(GRAPH.replace("/1/", "/0/"), None, b"no graph")],
    "another file name": [
        add('default_model_filename: "decoder.py"'),
        ("vae_decoder/1/model.py", None, None),
        ("vae_decoder/1/decoder.py", None, PYTHON),
    ],
    "a graph in a folder": [
        (GRAPH, None, None),
        (DATA, None, None),
        (f"{GRAPH}/model.onnx", None, make_graph()),
        (f"{GRAPH}/model.onnx.data", None, bytes(4)),
    ],
    "outputs of one number, and of any shape": [
        add('output { name: "scale" data_type: TYPE_FP32 dims: 1 }', "denoiser"),
        add('output { name: "free" data_type: TYPE_FP32 dims: [3, -1] }', "denoiser"),
    ],
    "no library, but bodies": [("denoiser", LIBRARY, "")],
    "no bodies, but a library": [(GRAPH, None, make_graph(body=False))],
    "an engine": [
        *ENGINE,
        (DENOISER, "KIND_GPU", 'KIND_GPU gpus: [0, 1] profile: ["0"]'),
        ("denoiser", "2, 2] }\ninput", "2, 2] is_non_linear_format_io: true }\ninput"),
    ],
    "an engine for each GPU": [
        *ENGINE[:3],
        ("denoiser", GROUP, f'cc_model_filenames {{ key: "8.9" value: "89.plan" }}\n{GROUP}'),
        ("denoiser/1/89.plan", None, b"engine"),
    ],
    "no batching": [("denoiser", BATCHING, "")],
    "a long delay that no step pays": [
        (SAMPLER, '"bls"', '"inprocess"'),
        ("denoiser", "microseconds: 200", "microseconds: 5000"),
    ],
    "priorities": [add("dynamic_batching { priority_levels: 2 default_priority_level: 2 }")],
    "decoupled, batched and warmed up": [
        (
            SAMPLER,
            GROUP,
            (
                "model_transaction_policy { decoupled: true }\n"
                "dynamic_batching { preserve_ordering: true }\n"
                f"model_warmup {{ batch_size: 8 {zeros('label', 'TYPE_INT32')}"
                'inputs { key: "seed" value { data_type: TYPE_INT64 dims: 1 random_data: true }}}\n'
                f"{GROUP}"
            ),
        )
    ],
    "a smaller batch than the profile's": [
        ("denoiser", "max_batch_size: 8", "max_batch_size: 4"),
        ("denoiser", "[4, 8]", "[4]"),
        ("denoiser", "batch_size: 8\n", "batch_size: 4\n"),
    ],
    "control inputs that are warmed up": [
        *ONLY_VAE,
        add(
            'sequence_batching { control_input { name: "START"\n'
            "  control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } } }\n"
            f"model_warmup {{ batch_size: 1 {zeros('START', 'TYPE_FP32')}"
            f"{zeros('latents', 'TYPE_FP32', '[4, 2, 2]')} }}"
        ),
    ],
    "an environment in the model's folder": [
        environment("$$TRITON_MODEL_DIRECTORY/env.tar.gz"),
        ("vae_decoder/env.tar.gz", None, ""),
    ],
    "an environment at its final place": [
        environment(f"{FINAL_ROOT}/vae_decoder/env.tar.gz"),
        ("vae_decoder/env.tar.gz", None, ""),
    ],
    "an environment in the cloud": [environment("s3://bucket/env.tar.gz")],
    "labels": [
        (VAE, "[16, 16, 3] }", '[16, 16, 3] label_filename: "labels.txt" }'),
        ("vae_decoder/labels.txt", None, ""),
    ],
    "a sampler of text": [
        *ENGINE,
        (SAMPLER, 'name: "label" data_type: TYPE_INT32', 'name: "words" data_type: TYPE_FP32'),
        (SAMPLER, NUM_CLASSES, ""),
        ("denoiser", LABELS_INPUT, 'name: "words" data_type: TYPE_FP32 dims: [1]'),
        (
            "denoiser",
            f'"class_labels" value {{ {WARMUP_LABELS}',
            '"words" value { data_type: TYPE_FP32 dims: [1] zero_data: true',
        ),
        before_output("denoiser", 'input { name: "guidance" data_type: TYPE_FP32 dims: 1 }'),
        (
            "denoiser",
            '  inputs { key: "sa',
            f'{zeros("guidance", "TYPE_FP32")}  inputs {{ key: "sa',
        ),
    ],
    "a sampler of latents": [
        (SAMPLER, 'output { name: "image" data_type: TYPE_UINT8 dims: [16, 16, 3] }\n', ""),
        (SAMPLER, 'parameters { key: "treeq_vae" value { string_value: "vae_decoder" } }\n', ""),
    ],
    "a sampler with its own denoiser": SAMPLER_ALONE,
    "a variant with more instances": [
        ("vae_decoder/configs/big.pbtxt", None, str(FILES[VAE]).replace("count: 1", "count: 4"))
    ],
    "an ensemble that is not batched": [(ENSEMBLE, "max_batch_size: 4", "")],
    "an ensemble of two steps": [
        (
            ENSEMBLE,
            STEP_OUTPUT,
            (
                f"{STEP_OUTPUT.replace('picture', 'again')} }}\n"
                '  step { model_name: "upscaler" model_version: 1\n'
                f'    input_map {{ key: "image" value: "again" }}\n    {STEP_OUTPUT}'
            ),
        ),
        (
            "upscaler/config.pbtxt",
            None,
            (
                'name: "upscaler" backend: "python" max_batch_size: 8\n'
                'input { name: "image" data_type: TYPE_UINT8 dims: [-1, -1, 3] }\n'
                'input { name: "factor" data_type: TYPE_FP32 dims: 1 optional: true }\n'
                'output { name: "image" data_type: TYPE_UINT8 dims: [16, 16, 3] }\n'
            ),
        ),
        ("upscaler/1/model.py", None, PYTHON),
    ],
    "a model of another folder of models": [
        (ENSEMBLE, 'model_name: "vae_decoder"', 'model_name: "far" model_namespace: "/srv/more"')
    ],
}


@pytest.mark.parametrize("edits", RIGHT.values(), ids=RIGHT.keys())
def test_nothing_is_found(tmp_path: Path, edits: list[Edit]) -> None:
    assert lint_repository(write_repository(tmp_path, edits), FINAL_ROOT) == []


def test_a_graph_that_is_not_batched_has_a_fixed_first_axis(tmp_path: Path) -> None:
    edits: list[Edit] = [
        *SAMPLER_ALONE,
        ("fixed/1/model.onnx", None, make_graph(batch=2)),
        ("fixed/1/model.onnx.data", None, bytes(4)),
        (
            "fixed/config.pbtxt",
            None,
            (
                'name: "fixed" platform: "onnxruntime_onnx"\n'
                'input { name: "sample" data_type: TYPE_FP32 dims: [2, 4, 2, 2] }\n'
                'input { name: "timestep" data_type: TYPE_FP32 dims: 2 }\n'
                'input { name: "class_labels" data_type: TYPE_INT64 dims: 2 }\n'
                'output { name: "prediction" data_type: TYPE_FP32 dims: [2, 4, 2, 2] }\n'
            ),
        ),
    ]
    found = lint_repository(write_repository(tmp_path, edits))
    assert {finding.rule for finding in found} == {"max-batch"}
