"""Repositories that are wrong in graphs, ensembles or samplers; no rule is left out."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.lint_repositories import (
    BATCHING,
    CPU,
    DATA,
    DENOISER,
    ENGINE,
    ENSEMBLE,
    FINAL_ROOT,
    GRAPH,
    IMAGE,
    LABELS_INPUT,
    LATENTS,
    LIBRARY,
    NUM_CLASSES,
    PREDICTION,
    SAMPLE,
    SAMPLER,
    STEP_OUTPUT,
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

SCALE = 'output { name: "scale" data_type: TYPE_FP32 dims: [1] }'
WORDS: list[Edit] = [
    (SAMPLER, 'name: "label" data_type: TYPE_INT32', 'name: "words" data_type: TYPE_FP32'),
    (SAMPLER, NUM_CLASSES, ""),
]


def set_parameter(key: str, old: str, new: str) -> Edit:
    return SAMPLER, parameter(key, old), parameter(key, new)


def step_output(text: str) -> Edit:
    return ENSEMBLE, STEP_OUTPUT, f"{STEP_OUTPUT} {text}"


WRONG = [
    wrong("graph-is-readable", "no ONNX graph", (GRAPH, None, b"\xff\xff garbage")),
    wrong("graph-is-readable", "no ONNX graph", (GRAPH, None, b"\x08\x0a")),
    wrong(
        "graph-inputs",
        'input "class_labels": received none of this name',
        ("denoiser", f"input {{ {LABELS_INPUT} }}\n", ""),
        also="warmup-inputs sampler-fits-denoiser",
    ),
    wrong(
        "graph-inputs",
        "a name that 1/model.onnx does not have",
        (
            "denoiser",
            f"input {{ {SAMPLE} }}",
            f"input {{ {SAMPLE} }} input {{ {SAMPLE.replace('sample', 'noise')} }}",
        ),
        also="warmup-inputs sampler-fits-denoiser",
    ),
    wrong(
        "graph-inputs", "received TYPE_INT32, expected TYPE_INT64", ("denoiser", "INT64", "INT32")
    ),
    wrong(
        "graph-inputs",
        "received [1], expected []",
        ("denoiser", LABELS_INPUT, LABELS_INPUT.replace(" reshape { shape: [] }", "")),
    ),
    wrong(
        "graph-inputs",
        "expected a free first axis",
        (GRAPH, None, make_graph(batch=2)),
        also="graph-outputs",
    ),
    wrong(
        "graph-outputs",
        "received [4, 2, 3], expected [4, 2, 2]",
        ("denoiser", PREDICTION, PREDICTION.replace("2, 2]", "2, 3]")),
    ),
    wrong(
        "graph-outputs",
        "received TYPE_FP16, expected TYPE_FP32",
        ("denoiser", PREDICTION, PREDICTION.replace("32", "16")),
    ),
    wrong(
        "graph-outputs",
        "received dims [2], expected [1]",
        ("denoiser", "instance_group", f"{SCALE.replace('1', '2')} instance_group"),
    ),
    wrong("external-data", "received no such file", (DATA, None, None)),
    wrong("external-data", "received no such file", (GRAPH, None, make_graph(branch="b.data"))),
    wrong(
        "external-data",
        "received 4 bytes, expected at least 12",
        (GRAPH, None, make_graph(offset=8)),
    ),
    wrong(
        "external-data", "a file beside the graph", (GRAPH, None, make_graph(location="../data"))
    ),
    wrong(
        "operator-is-known",
        "expected the library of Scale",
        ("denoiser", LIBRARY, ""),
        (GRAPH, None, make_graph(body=False)),
    ),
    wrong(
        "ensemble-form",
        'expected platform: "ensemble" with it',
        (ENSEMBLE, 'platform: "ensemble"', 'backend: "other"'),
    ),
    wrong(
        "ensemble-form",
        "expected ensemble_scheduling with it",
        (ENSEMBLE, "ensemble_scheduling", "model_repository_agents"),
        (ENSEMBLE, "step {", 'agents { name: "a"'),
        (ENSEMBLE, 'model_name: "vae_decoder" model_version: -1', ""),
        (ENSEMBLE, 'input_map { key: "latents" value: "z" }', ""),
        (ENSEMBLE, STEP_OUTPUT, ""),
    ),
    wrong(
        "ensemble-form",
        "received no step",
        (ENSEMBLE, 'model_name: "vae_decoder" model_version: -1', ""),
        (ENSEMBLE, "  step {\n    \n", ""),
        (ENSEMBLE, 'input_map { key: "latents" value: "z" }', ""),
        (ENSEMBLE, f"{STEP_OUTPUT}\n  }}", ""),
    ),
    wrong(
        "ensemble-form",
        "instance_group: received it for an ensemble",
        (ENSEMBLE, "max_batch", "instance_group { count: 1 } max_batch"),
    ),
    wrong(
        "ensemble-models",
        "received a model that is not there",
        (ENSEMBLE, 'model_name: "vae_decoder"', 'model_name: "vae"'),
    ),
    wrong("ensemble-models", "received no model_name", (ENSEMBLE, 'model_name: "vae_decoder"', "")),
    wrong(
        "ensemble-models",
        "received no output_map",
        (ENSEMBLE, STEP_OUTPUT, ""),
        also="ensemble-flow",
    ),
    wrong(
        "ensemble-models", "received model_version 0, or none", (ENSEMBLE, "model_version: -1", "")
    ),
    wrong(
        "ensemble-models",
        "expected at most 4, the step's",
        (ENSEMBLE, "max_batch_size: 4", "max_batch_size: 8"),
    ),
    wrong(
        "ensemble-maps",
        'received input_map key "x"',
        (ENSEMBLE, "input_map", 'input_map { key: "x" value: "z" } input_map'),
    ),
    wrong(
        "ensemble-maps",
        'received output_map key "x"',
        step_output('output_map { key: "x" value: "y" }'),
        also="ensemble-flow",
    ),
    wrong(
        "ensemble-maps",
        'received no input_map key "more"',
        add('input { name: "more" data_type: TYPE_FP32 dims: 1 }'),
    ),
    wrong("ensemble-tensors", "received TYPE_FP32 by step 0", (ENSEMBLE, "TYPE_FP32", "TYPE_FP16")),
    wrong(
        "ensemble-tensors",
        "received shape [-1, 16, 16, 3] by step 0",
        (ENSEMBLE, "[16, 16, 3]", "[16, 16]"),
    ),
    wrong(
        "ensemble-flow",
        '"picture": received 2 steps that write it',
        add('output { name: "again" data_type: TYPE_UINT8 dims: [16, 16, 3] }'),
        step_output('output_map { key: "again" value: "picture" }'),
    ),
    wrong(
        "ensemble-flow",
        '"picture": received no step that can write it',
        (
            ENSEMBLE,
            'input_map { key: "latents" value: "z" }',
            'input_map { key: "latents" value: "y" }',
        ),
    ),
    wrong(
        "ensemble-flow",
        '"more": received no step that reads it',
        (ENSEMBLE, "output {", 'input { name: "more" data_type: TYPE_FP32 dims: 1 }\noutput {'),
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
    wrong(
        "sampler-outputs",
        'output "step": received TYPE_INT64',
        (SAMPLER, 'name: "step" data_type: TYPE_INT32', 'name: "step" data_type: TYPE_INT64'),
    ),
    wrong("sampler-has-denoiser", "without a model denoiser beside it", ("denoiser", None, None)),
    wrong(
        "sampler-has-denoiser",
        "whose max_batch_size is 0",
        ("denoiser", "max_batch_size: 8", ""),
        ("denoiser", BATCHING, ""),
        also="max-batch tensor-reshape warmup-runs graph-inputs graph-outputs",
    ),
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
        "sampler-reads-prediction",
        "received outputs noise",
        *ENGINE,
        ("denoiser", '"prediction"', '"noise"'),
    ),
    wrong(
        "sampler-has-decoder",
        "without a model vae_decoder",
        ("vae_decoder", None, None),
        ("pipeline", None, None),
    ),
    wrong(
        "variant-is-same-model",
        "max_batch_size: received 4, expected 8",
        (CPU, "max_batch_size: 8", "max_batch_size: 4"),
        (CPU, BATCHING, ""),
        also="warmup-runs",
    ),
    wrong(
        "variant-is-same-model",
        "output: received others",
        (CPU, PREDICTION, f'{PREDICTION} label_filename: "c"'),
        ("denoiser/c", None, ""),
    ),
    wrong(
        "variant-is-complete",
        "expected one as of denoiser",
        (VAE, "count: 1", "count: 1 kind: KIND_GPU"),
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
    [[], [(SAMPLER, "TYPE_INT64", "TYPE_BF16"), (GRAPH, None, b"")]],
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
    configs = (DENOISER, CPU, SAMPLER, VAE, ENSEMBLE)
    assert runs == {
        **{(rule_id(rule), "."): 1 for rule in REPOSITORY_RULES},
        **{(rule_id(rule), config): 1 for rule in CONFIG_RULES for config in configs},
    }
