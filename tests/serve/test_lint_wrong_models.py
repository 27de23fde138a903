"""Repositories that are wrong in graphs or samplers; no rule is left out."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.lint_repositories import (
    BATCHING,
    CPU,
    DENOISER,
    ENGINE,
    FINAL_ROOT,
    GRAPH,
    IMAGE,
    LABELS_INPUT,
    LATENTS,
    NUM_CLASSES,
    PREDICTION,
    SAMPLE,
    SAMPLER,
    VAE,
    Edit,
    Wrong,
    add,
    check_wrong,
    make_graph,
    parameter,
    write_repository,
    wrong,
)
from tests.serve.test_lint_wrong import WRONG as WRONG_CONFIGS
from treeq_export.serve import lint
from treeq_export.serve.lint import CONFIG_RULES, REPOSITORY_RULES, lint_repository, rule_id

WORDS: list[Edit] = [
    (SAMPLER, 'name: "label" data_type: TYPE_INT32', 'name: "words" data_type: TYPE_FP32'),
    (SAMPLER, NUM_CLASSES, ""),
]


def set_parameter(key: str, old: str, new: str) -> Edit:
    return SAMPLER, parameter(key, old), parameter(key, new)


WRONG = [
    wrong("graph-is-readable", "no ONNX graph", (GRAPH, None, b"\xff\xff garbage")),
    wrong("graph-is-readable", "no ONNX graph", (GRAPH, None, b"\x08\x0a")),
    wrong(
        "graph-tensors",
        'input "class_labels": received none of this name',
        ("denoiser", f"input {{ {LABELS_INPUT} }}\n", ""),
        also="warmup-inputs sampler-fits-denoiser",
    ),
    wrong(
        "graph-tensors",
        "a name that 1/model.onnx does not have",
        (
            "denoiser",
            f"input {{ {SAMPLE} }}",
            f"input {{ {SAMPLE} }} input {{ {SAMPLE.replace('sample', 'noise')} }}",
        ),
        also="warmup-inputs sampler-fits-denoiser",
    ),
    wrong(
        "graph-tensors", "received TYPE_INT32, expected TYPE_INT64", ("denoiser", "INT64", "INT32")
    ),
    wrong(
        "graph-tensors",
        "received [1], expected []",
        ("denoiser", LABELS_INPUT, LABELS_INPUT.replace(" reshape { shape: [] }", "")),
    ),
    wrong(
        "graph-tensors",
        "expected a free first axis",
        (GRAPH, None, make_graph(batch=2)),
    ),
    wrong(
        "graph-tensors",
        "received [4, 2, 3], expected [4, 2, 2]",
        ("denoiser", PREDICTION, PREDICTION.replace("2, 2]", "2, 3]")),
    ),
    wrong(
        "graph-tensors",
        "received TYPE_FP16, expected TYPE_FP32",
        ("denoiser", PREDICTION, PREDICTION.replace("32", "16")),
    ),
    wrong(
        "sampler-parameters",
        'received treeq_mode "serial"',
        set_parameter("treeq_mode", "bls", "serial"),
    ),
    wrong(
        "sampler-parameters",
        'received treeq_mode ""',
        (SAMPLER, parameter("treeq_mode", "bls"), ""),
    ),
    wrong(
        "sampler-parameters", "received no treeq_model", set_parameter("treeq_model", "digits", "")
    ),
    wrong(
        "sampler-parameters", 'received treeq_steps "0"', set_parameter("treeq_steps", "20", "0")
    ),
    wrong(
        "sampler-parameters",
        'received treeq_guidance "nan"',
        set_parameter("treeq_guidance", "1.5", "nan"),
    ),
    wrong(
        "sampler-parameters",
        'received treeq_guidance "1,5"',
        set_parameter("treeq_guidance", "1.5", "1,5"),
    ),
    wrong(
        "sampler-parameters",
        "received input label without treeq_num_classes",
        (SAMPLER, NUM_CLASSES, ""),
    ),
    wrong(
        "sampler-inputs",
        'input "seed": received none',
        (SAMPLER, 'input { name: "seed" data_type: TYPE_INT64 dims: [1] }', ""),
    ),
    wrong("sampler-inputs", "expected TYPE_INT64, dims [1]", (SAMPLER, "TYPE_INT64", "TYPE_INT32")),
    wrong(
        "sampler-parameters",
        "received treeq_num_classes without input label",
        WORDS[0],
        also="sampler-fits-denoiser",
    ),
    wrong(
        "sampler-inputs",
        "expected either label or",
        add('input { name: "words" data_type: TYPE_FP32 dims: 1 }', SAMPLER),
        also="sampler-fits-denoiser",
    ),
    wrong(
        "sampler-outputs",
        "received TYPE_FP32, dims [16, 16, 3], expected TYPE_UINT8",
        (SAMPLER, IMAGE, IMAGE.replace("UINT8", "FP32")),
    ),
    wrong(
        "sampler-outputs",
        "dims [3, 16, 16]",
        (SAMPLER, IMAGE, IMAGE.replace("[16, 16, 3]", "[3, 16, 16]")),
    ),
    wrong(
        "sampler-outputs",
        "received step, expected latents",
        (SAMPLER, f"output {{ {LATENTS} }}", ""),
        (SAMPLER, f"output {{ {IMAGE} }}", ""),
    ),
    wrong("sampler-fits-denoiser", "without a model denoiser beside it", ("denoiser", None, None)),
    wrong(
        "sampler-fits-denoiser",
        'received no input "words"',
        (SAMPLER, 'name: "label" data_type: TYPE_INT32', 'name: "words" data_type: TYPE_FP32'),
        (SAMPLER, NUM_CLASSES, ""),
    ),
    wrong(
        "sampler-fits-denoiser",
        'a required input "class_labels"',
        (SAMPLER, 'name: "label" data_type: TYPE_INT32', 'name: "words" data_type: TYPE_FP32'),
        (SAMPLER, NUM_CLASSES, ""),
    ),
    wrong(
        "sampler-fits-denoiser",
        'input "sample" of TYPE_FP32, dims [4, 2, 2], expected TYPE_FP32, dims [4, 4, 2]',
        (SAMPLER, LATENTS, LATENTS.replace("[4, 2", "[4, 4")),
    ),
    wrong(
        "sampler-fits-denoiser",
        "received outputs noise",
        *ENGINE,
        ("denoiser", '"prediction"', '"noise"'),
    ),
    wrong(
        "sampler-has-decoder",
        "without a model vae_decoder",
        ("vae_decoder", None, None),
    ),
    wrong(
        "variant-is-same-model",
        "max_batch_size: received another than",
        (CPU, "max_batch_size: 8", "max_batch_size: 4"),
        (CPU, BATCHING, ""),
    ),
    wrong(
        "variant-is-same-model",
        "output: received another than",
        (CPU, PREDICTION, f'{PREDICTION} label_filename: "c"'),
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case.rule}: {case.words}")
def test_rule_finds_it(tmp_path: Path, case: Wrong) -> None:
    check_wrong(tmp_path, case)


def test_every_rule_has_a_wrong_repository() -> None:
    tried = {case.rule for case in (*WRONG_CONFIGS, *WRONG)}
    tried |= {"path-is-fit"}  # in test_lint.py
    tried |= {"file-is-as-written"}  # in test_serve_stage.py
    assert tried == {rule_id(rule) for rule in (*REPOSITORY_RULES, *CONFIG_RULES)}


@pytest.mark.parametrize(
    "edits",
    [[], [(SAMPLER, "TYPE_INT64", "TYPE_INT8"), (GRAPH, None, b"")]],
    ids=["right", "wrong"],
)
def test_all_rules_run_on_every_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: list[Edit]
) -> None:
    """Whatever the others find; each is exhausted, not only called."""
    runs: Counter[tuple[str, str]] = Counter()

    def counted(rule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rule)
        def run(subject: Any) -> Any:
            yield from rule(subject)
            runs[rule_id(rule), str(getattr(subject, "path", tmp_path).relative_to(tmp_path))] += 1

        return run

    monkeypatch.setattr(lint, "REPOSITORY_RULES", tuple(map(counted, REPOSITORY_RULES)))
    monkeypatch.setattr(lint, "CONFIG_RULES", tuple(map(counted, CONFIG_RULES)))
    found = lint_repository(write_repository(tmp_path, edits), FINAL_ROOT)
    assert bool(found) == bool(edits)
    configs = (DENOISER, CPU, SAMPLER, VAE)
    assert runs == {
        **{(rule_id(rule), "."): 1 for rule in REPOSITORY_RULES},
        **{(rule_id(rule), config): 1 for rule in CONFIG_RULES for config in configs},
    }
