"""Repositories that are wrong in identity, files, tensors, batches; the rest is beside this."""

from pathlib import Path

import pytest

from tests.serve.lint_repositories import (
    CPU,
    DENOISER,
    ENGINE,
    GRAPH,
    IMAGE,
    LATENTS,
    MANIFEST,
    VAE,
    VAE_WARMUP,
    WARMUP_VALUE,
    Edit,
    Wrong,
    add,
    check_wrong,
    wrong,
)

LIBRARY_PATH = "/srv/final/denoiser/lib/libtreeq_ort.so"


def warmup(value: str) -> Edit:
    return add(VAE_WARMUP % value)


WRONG = [
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
        "backend: Field required",
        (MANIFEST, '"backend"', '"back_end"'),
    ),
    wrong("manifest-is-readable", "not JSON (Extra data", (MANIFEST, None, "{} {}")),
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
        "name-is-folder", 'received none, expected "vae_decoder"', (VAE, 'name: "vae_decoder"', "")
    ),
    wrong(
        "name-is-folder",
        'received "vae", expected "vae_decoder"',
        (VAE, 'name: "vae_decoder"', 'name: "vae"'),
    ),
    wrong("instance-device", "received KIND_GPU, expected KIND_CPU", (CPU, "KIND_CPU", "KIND_GPU")),
    wrong(
        "instance-device",
        "KIND_CPU for a TensorRT engine",
        *ENGINE,
        (DENOISER, "KIND_GPU", "KIND_CPU"),
    ),
    wrong("op-library", "which is not there", ("denoiser/lib", None, None)),
    wrong("op-library", "expected an absolute path", ("denoiser", LIBRARY_PATH, "libtreeq_ort.so")),
    wrong(
        "version-is-there",
        "received no version folder",
        ("vae_decoder/1", None, None),
    ),
    wrong(
        "model-file",
        "received no such file",
        ("vae_decoder/1/model.py", None, None),
        ("vae_decoder/1/other.py", None, ""),
    ),
    wrong("model-file", "received an empty file", (GRAPH, None, b"")),
    wrong(
        "tensors-are-stated",
        "input: received none",
        (VAE, f"input {{ {LATENTS} }}", ""),
    ),
    wrong(
        "tensors-are-stated",
        "output: received none",
        (VAE, f"output {{ {IMAGE} }}", ""),
    ),
    wrong(
        "tensors-are-stated", "received data_type TYPE_INVALID", add('output { name: "x" dims: 1 }')
    ),
    wrong(
        "tensors-are-stated",
        "received data_type 99",
        add('output { name: "x" data_type: 99 dims: 1 }'),
    ),
    wrong(
        "tensors-are-stated", "received dims []", add('output { name: "x" data_type: TYPE_FP32 }')
    ),
    wrong(
        "tensors-are-stated",
        "received dims [0]",
        add('output { name: "x" data_type: TYPE_FP32 dims: 0 }'),
    ),
    wrong(
        "tensors-are-stated",
        "received dims [3, -2]",
        add('output { name: "x" data_type: TYPE_FP32 dims: [3, -2] }'),
    ),
    wrong("max-batch", "received 0, or none", (VAE, "max_batch_size: 4", "")),
    wrong(
        "batch-fits-profile",
        "expected at most 4",
        (MANIFEST, '"max": 8', '"max": 4'),
        also="warmup-covers-profile",
    ),
    wrong(
        "queue-delay",
        "received max_queue_delay_microseconds 201",
        ("denoiser", "microseconds: 200", "microseconds: 201"),
    ),
    wrong("warmup-inputs", "received no latents", add("model_warmup { batch_size: 1 }")),
    wrong(
        "warmup-inputs",
        "received more, expected inputs of the model only",
        add(VAE_WARMUP.replace(" }\n", ' inputs { key: "more" value { } } }\n') % WARMUP_VALUE),
    ),
    wrong(
        "warmup-values",
        "received TYPE_FP16, expected TYPE_FP32",
        warmup(WARMUP_VALUE.replace("32", "16")),
    ),
    wrong("warmup-values", "received no data", warmup("data_type: TYPE_FP32 dims: [4, 2, 2]")),
    wrong("warmup-values", "not in the model's folder warmup/", ("denoiser/warmup", None, None)),
    wrong("warmup-values", "of 7 bytes, expected 8", ("denoiser/warmup/c", None, bytes(7))),
    wrong(
        "warmup-covers-profile",
        "received no sample of batch_size 4",
        (MANIFEST, '"opt": 2', '"opt": 4'),
    ),
    *(
        wrong(
            "warmup-values",
            f"received dims {dims}",
            warmup(WARMUP_VALUE.replace("[4, 2, 2]", dims)),
        )
        for dims in ("[1, 4, 2, 2]", "[4, 2, 3]", "[4, -1, 2]")
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case.rule}: {case.words}")
def test_rule_finds_it(tmp_path: Path, case: Wrong) -> None:
    check_wrong(tmp_path, case)
