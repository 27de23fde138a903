"""Repositories that are wrong in identity, files, tensors, batches; the rest is beside this."""

from pathlib import Path

import pytest

from tests.serve.lint_repositories import (
    CPU,
    DENOISER,
    ENGINE,
    ENSEMBLE,
    GRAPH,
    IMAGE,
    LATENTS,
    LIBRARY,
    MANIFEST,
    PYTHON,
    SAMPLE,
    SAMPLER,
    VAE,
    VAE_WARMUP,
    WARMUP_LABELS,
    WARMUP_VALUE,
    Edit,
    Wrong,
    add,
    check_wrong,
    parameter,
    wrong,
)

LIBRARY_PATH = "/srv/final/denoiser/lib/libtreeq_ort.so"


def warmup(value: str) -> Edit:
    return add(VAE_WARMUP % value)


WRONG = [
    wrong("folder-is-model", "without config.pbtxt", ("__pycache__/x.pyc", None, "")),
    wrong("config-is-there", "received no config.pbtxt", (VAE, None, None)),
    wrong(
        "schema",
        'line 4, column 62: Message type "inference.ModelInput" has no field named "dimz"',
        (VAE, "[4, 2, 2]", "[4, 2, 2] dimz: 3"),
    ),
    wrong(
        "schema",
        "line 1, column 7: 'name: vae_decoder': Expected string",
        (VAE, 'name: "vae_decoder"', "name: vae_decoder"),
    ),
    wrong("schema", "should not have multiple", add("max_batch_size: 3")),
    wrong("schema", "another member of oneof", warmup(f"{WARMUP_VALUE} random_data: true")),
    wrong("schema", "not UTF-8 at byte 6", (VAE, None, b"name: \xff")),
    wrong("schema", "Value out of range", (VAE, "max_batch_size: 4", "max_batch_size: 9999999999")),
    wrong(
        "manifest-is-readable",
        "expected 1 <= min <= opt <= max",
        (MANIFEST, '"opt": 2', '"opt": 9'),
    ),
    wrong(
        "manifest-is-readable",
        "denoiser.profile.max: Field required",
        (MANIFEST, '"max"', '"most"'),
    ),
    wrong("manifest-is-readable", "not JSON (Extra data", (MANIFEST, "{", "")),
    wrong(
        "manifest-is-readable",
        "the whole: Input should be an object",
        (MANIFEST, None, "[]"),
    ),
    wrong(
        "manifest-is-readable",
        "more than 64 levels deep",
        (MANIFEST, None, "[" * 100_000),
    ),
    *(
        wrong("launch-is-guarded", words, ("launch.sh", None, f"tritonserver {options}\n"))
        for words, options in (
            ("received --http-address none", "--model-control-mode=explicit"),
            ("received --grpc-address none", "--model-control-mode poll --http-address=10.0.0.1"),
            (
                "received --http-address 0.0.0.0",
                "--model-control-mode=explicit --http-address=0.0.0.0 --grpc-address=127.0.0.1",
            ),
            (
                "received --grpc-address ${A:-0.0.0.0}",
                "--model-control-mode=explicit --http-address=::1 --grpc-address=${A:-0.0.0.0}",
            ),
            (
                "received --grpc-address [::]",
                "--model-control-mode=explicit --http-address=10.0.0.1 --grpc-address=[::]",
            ),
        )
    ),
    wrong(
        "key-is-unique",
        'parameters: received key "treeq_steps" more than once',
        add(parameter("treeq_steps", "3"), SAMPLER),
    ),
    wrong(
        "key-is-unique",
        "model_warmup.inputs",
        add(
            VAE_WARMUP.replace(
                " } }\n", f' }} inputs {{ key: "latents" value {{ {WARMUP_VALUE} }} }} }}\n'
            )
            % WARMUP_VALUE
        ),
    ),
    wrong(
        "name-is-folder", 'received none, expected "vae_decoder"', (VAE, 'name: "vae_decoder"', "")
    ),
    wrong(
        "name-is-folder",
        'received "vae", expected "vae_decoder"',
        (VAE, 'name: "vae_decoder"', 'name: "vae"'),
    ),
    wrong("backend-is-named", "neither a backend nor a platform", (VAE, 'backend: "python"', "")),
    wrong(
        "backend-is-named",
        'received "onnxruntime"',
        (VAE, 'backend: "python"', 'platform: "onnxruntime"'),
    ),
    wrong(
        "platform-fits-backend",
        'expected backend "tensorrt"',
        (VAE, 'backend: "python"', 'backend: "python" platform: "tensorrt_plan"'),
    ),
    wrong(
        "platform-fits-backend",
        "expected another platform",
        ("denoiser", 'platform: "onnxruntime_onnx"', 'platform: "onnx" backend: "onnxruntime"'),
    ),
    wrong(
        "platform-fits-backend",
        "expected no backend",
        (ENSEMBLE, "max_batch", 'backend: "python" max_batch'),
        also="model-file",
    ),
    wrong("instance-count", "received count 0, or none", (VAE, "count: 1", "kind: KIND_CPU")),
    wrong("instance-count", "received count -2", (VAE, "count: 1", "count: -2")),
    wrong("instance-device", "received KIND_GPU, expected KIND_CPU", (CPU, "KIND_CPU", "KIND_GPU")),
    wrong("instance-device", "received gpus [0] for KIND_AUTO", (CPU, "kind: KIND_CPU", "gpus: 0")),
    wrong(
        "instance-device",
        "received gpus [0] for KIND_CPU",
        (SAMPLER, "KIND_CPU", "KIND_CPU gpus: 0"),
    ),
    wrong(
        "instance-device",
        "received gpus [1] for KIND_MODEL",
        (SAMPLER, "KIND_CPU", "KIND_MODEL gpus: 1"),
    ),
    wrong(
        "instance-device",
        "KIND_CPU for a TensorRT engine",
        *ENGINE,
        (DENOISER, "KIND_GPU", "KIND_CPU"),
    ),
    wrong("instance-profile", 'for backend "python"', (VAE, "count: 1", 'count: 1 profile: "0"')),
    wrong(
        "instance-profile",
        "received profile ['a']",
        *ENGINE,
        (DENOISER, "KIND_GPU", 'KIND_GPU profile: "a"'),
    ),
    wrong(
        "execution-environment",
        "is not there",
        add(parameter("EXECUTION_ENV_PATH", "/srv/none.tar.gz")),
    ),
    wrong("op-library", "which is not there", ("denoiser/lib", None, None)),
    wrong("op-library", "expected an absolute path", ("denoiser", LIBRARY_PATH, "libtreeq_ort.so")),
    wrong("op-library", 'for backend "tensorrt", which ignores it', ENGINE[0], *ENGINE[2:]),
    wrong("op-library", "for an ensemble", (ENSEMBLE, "max_batch", f"{LIBRARY} max_batch")),
    wrong(
        "version-is-there",
        "received no version folder",
        ("vae_decoder/1", None, None),
    ),
    wrong("version-is-there", "git keeps no empty folders", ("pipeline/1", None, None)),
    wrong("version-is-there", "reads it as version 2", ("vae_decoder/2.bak/model.py", None, "")),
    wrong("version-is-there", "ignores it", ("vae_decoder/02/model.py", None, "")),
    wrong(
        "version-is-there",
        "as version -3",
        ("vae_decoder/1", None, None),
        ("vae_decoder/-3/model.py", None, PYTHON),
    ),
    wrong("version-is-there", 'Rename it to "2"', ("vae_decoder/v2/model.py", None, "")),
    wrong(
        "version-policy",
        "num_versions 0",
        add("version_policy { latest { } }"),
    ),
    wrong(
        "version-policy",
        "received specific versions [1, 3]",
        add("version_policy { specific { versions: [1, 3] } }"),
    ),
    wrong(
        "version-policy", "received specific versions []", add("version_policy { specific { } }")
    ),
    wrong(
        "model-file",
        "received no such file",
        ("vae_decoder/1/model.py", None, None),
        ("vae_decoder/1/other.py", None, ""),
    ),
    wrong("model-file", "received no such file", add('default_model_filename: "decoder.py"')),
    wrong("model-file", "received an empty file", (GRAPH, None, b"")),
    wrong(
        "model-file",
        "Git LFS",
        *ENGINE,
        ("denoiser/1/model.plan", None, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    wrong(
        "python-model",
        "received no TritonPythonModel",
        ("vae_decoder/1/model.py", None, "import numpy\n"),
    ),
    wrong("label-file", "is not there", (VAE, IMAGE, f'{IMAGE} label_filename: "labels.txt"')),
    wrong(
        "tensors-are-stated",
        "input: received none",
        (VAE, f"input {{ {LATENTS} }}", ""),
        also="ensemble-maps",
    ),
    wrong(
        "tensors-are-stated",
        "output: received none",
        (VAE, f"output {{ {IMAGE} }}", ""),
        also="ensemble-maps",
    ),
    wrong(
        "tensor-name",
        "received no name",
        (VAE, 'output { name: "image"', "output {"),
        also="ensemble-maps",
    ),
    wrong("tensor-name", "received 2 of this name", add(f"output {{ {IMAGE} }}")),
    wrong("tensor-type", "received data_type TYPE_INVALID", add('output { name: "x" dims: 1 }')),
    wrong(
        "tensor-type", "received data_type 99", add('output { name: "x" data_type: 99 dims: 1 }')
    ),
    wrong(
        "tensor-type",
        "received TYPE_BF16",
        add('output { name: "x" data_type: TYPE_BF16 dims: 1 }'),
    ),
    wrong(
        "tensor-type",
        "received TYPE_STRING",
        add('output { name: "x" data_type: TYPE_STRING dims: 1 }'),
    ),
    wrong("tensor-dims", "received dims []", add('output { name: "x" data_type: TYPE_FP32 }')),
    wrong(
        "tensor-dims", "received dims [0]", add('output { name: "x" data_type: TYPE_FP32 dims: 0 }')
    ),
    wrong(
        "tensor-dims",
        "received dims [3, -2]",
        add('output { name: "x" data_type: TYPE_FP32 dims: [3, -2] }'),
    ),
    *(
        wrong(
            "tensor-reshape",
            f"received reshape {reshape}",
            add(f'output {{ name: "x" data_type: 11 dims: 4 reshape {{ shape: {reshape} }} }}'),
        )
        for reshape in ("[2]", "[]", "[-1, 4]", "[4, 0]")
    ),
    wrong(
        "tensor-reshape",
        "with max_batch_size 0",
        add('output { name: "x" data_type: TYPE_FP32 dims: 1 reshape { } }'),
        (VAE, "max_batch_size: 4", ""),
        also="max-batch",
    ),
    wrong(
        "tensor-format",
        "received FORMAT_NHWC",
        add('input { name: "x" data_type: TYPE_FP32 dims: 1 optional: true format: FORMAT_NHWC }'),
    ),
    wrong(
        "tensor-format", "received is_shape_tensor", (VAE, IMAGE, f"{IMAGE} is_shape_tensor: true")
    ),
    wrong(
        "tensor-is-optional",
        "received optional: true",
        ("denoiser", SAMPLE, f"{SAMPLE} optional: true"),
    ),
    wrong("max-batch", "received 0, or none", (VAE, "max_batch_size: 4", "")),
    wrong("max-batch", "received -1", (ENSEMBLE, "max_batch_size: 4", "max_batch_size: -1")),
    wrong(
        "batch-fits-profile",
        "expected at most 4",
        (MANIFEST, "8", "4"),
        also="warmup-covers-profile",
    ),
    wrong("preferred-batch", "[4, 16]", ("denoiser", "[4, 8]", "[4, 16]")),
    wrong("preferred-batch", "[0, 8]", ("denoiser", "[4, 8]", "[0, 8]")),
    wrong(
        "batching-needs-batches",
        "where it merges nothing",
        add("dynamic_batching { }"),
        (VAE, "max_batch_size: 4", ""),
        also="max-batch",
    ),
    wrong(
        "queue-delay",
        "received max_queue_delay_microseconds 201",
        ("denoiser", "microseconds: 200", "microseconds: 201"),
    ),
    wrong(
        "queue-priority", "received priorities [0]", add("dynamic_batching { priority_levels: 2 }")
    ),
    wrong(
        "queue-priority",
        "preserve_ordering with 2",
        add(
            "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
            "preserve_ordering: true }"
        ),
    ),
    wrong(
        "decoupled-answers",
        "the server refuses both",
        add(
            "model_transaction_policy { decoupled: true } response_cache { enable: true }", SAMPLER
        ),
    ),
    wrong(
        "decoupled-answers",
        "which answers once",
        add("model_transaction_policy { decoupled: true }", "denoiser"),
        also="sampler-has-denoiser",
    ),
    wrong(
        "warmup-runs",
        "skips the sample",
        ("denoiser", "batch_size: 1\n", "\n"),
        also="warmup-covers-profile",
    ),
    wrong(
        "warmup-runs",
        "received batch_size 16, expected at most 8",
        ("denoiser", "batch_size: 8\n  inputs", "batch_size: 16\n  inputs"),
        also="warmup-covers-profile",
    ),
    wrong("warmup-inputs", "received no latents", add("model_warmup { batch_size: 1 }")),
    wrong(
        "warmup-inputs",
        "received more, expected inputs of the model only",
        add(VAE_WARMUP.replace(" }\n", ' inputs { key: "more" value { } } }\n') % WARMUP_VALUE),
        also="warmup-data",
    ),
    wrong(
        "warmup-types",
        "received TYPE_FP16, expected TYPE_FP32",
        warmup(WARMUP_VALUE.replace("32", "16")),
    ),
    wrong("warmup-data", "received no data", warmup("data_type: TYPE_FP32 dims: [4, 2, 2]")),
    wrong(
        "warmup-data",
        "no class has such a label",
        ("denoiser", WARMUP_LABELS, "data_type: TYPE_INT64 dims: [1] random_data: true"),
    ),
    wrong("warmup-files", "not in the model's folder warmup/", ("denoiser/warmup", None, None)),
    wrong("warmup-files", "of 7 bytes, expected 8", ("denoiser/warmup/c", None, bytes(7))),
    wrong(
        "warmup-covers-profile",
        "received no sample of batch_size 4",
        (MANIFEST, '"opt": 2', '"opt": 4'),
    ),
    *(
        wrong(
            "warmup-dims", f"received dims {dims}", warmup(WARMUP_VALUE.replace("[4, 2, 2]", dims))
        )
        for dims in ("[1, 4, 2, 2]", "[4, 2, 3]", "[4, -1, 2]")
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case.rule}: {case.words}")
def test_rule_finds_it(tmp_path: Path, case: Wrong) -> None:
    check_wrong(tmp_path, case)
