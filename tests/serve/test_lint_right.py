"""What the lint has nothing to say about; each was tried with a real server, or read in its source.

Those of ONNX Runtime's and TensorRT's backends were read.
"""

from pathlib import Path

import pytest

from tests.serve.lint_repositories import (
    BATCHING,
    DENOISER,
    ENGINE,
    FILES,
    FINAL_ROOT,
    GRAPH,
    LABELS_INPUT,
    LIBRARY,
    MANIFEST,
    NUM_CLASSES,
    PYTHON,
    SAMPLER,
    VAE,
    WARMUP_LABELS,
    Edit,
    add,
    make_graph,
    write_repository,
)
from treeq_export.serve.lint import lint_repository

GROUP = "instance_group"
ONLY_VAE: list[Edit] = [(name, None, None) for name in ("denoiser", "sampler", "pipeline")]
SAMPLER_ALONE: list[Edit] = [("denoiser", None, None), (SAMPLER, '"bls"', '"inprocess"')]


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
    "a manifest of another program": [(MANIFEST, None, '{"name": "other"}')],
    "an older version that is broken": [
        ("denoiser/2/model.onnx", None, make_graph()),
        (GRAPH, None, b"no graph"),
    ],
    "folders that are no versions": [
        (f"vae_decoder/{name}/x", None, "") for name in ("1.bak", "v1", "old", "0.5", "-3")
    ],
    "a backend and its platform": [("denoiser", "platform:", 'backend: "onnxruntime" platform:')],
    "all that text format allows": [
        (VAE, 'backend: "python"', "backend: 'pyt' \"hon\"; # comment"),
        (VAE, "max_batch_size: 4", "max_batch_size: 0x4,"),
        (VAE, "output {", "output: <"),
        (VAE, "[16, 16, 3] }", "[16, 16, 3] >"),
    ],
    "an optional input that is not warmed up": [
        before_output(VAE, 'input { name: "q" data_type: TYPE_INT32 dims: 1 optional: true }'),
        add(
            'model_warmup { batch_size: 4 inputs { key: "latents" value '
            "{ data_type: TYPE_FP32 dims: [4, 2, 2] random_data: true } } }"
        ),
    ],
    "version 0": [("vae_decoder/0/model.py", None, PYTHON), ("vae_decoder/1", None, None)],
    "an output of any shape": [
        add('output { name: "free" data_type: TYPE_FP32 dims: [3, -1] }', "denoiser"),
    ],
    "no library, but bodies": [("denoiser", LIBRARY, "")],
    "an engine": [
        *ENGINE,
        (DENOISER, "KIND_GPU", "KIND_GPU gpus: [0, 1]"),
    ],
    "no batching": [("denoiser", BATCHING, "")],
    "a long delay that no step pays": [
        (SAMPLER, '"bls"', '"inprocess"'),
        ("denoiser", "microseconds: 200", "microseconds: 5000"),
    ],
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
        ("denoiser", "batch_size: 8\n", "batch_size: 4\n"),
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
}


@pytest.mark.parametrize("edits", RIGHT.values(), ids=RIGHT.keys())
def test_nothing_is_found(tmp_path: Path, edits: list[Edit]) -> None:
    assert lint_repository(write_repository(tmp_path, edits), FINAL_ROOT) == []
