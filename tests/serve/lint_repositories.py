"""A model repository made by hand that lint has nothing to say about, and edits of it.

denoiser      onnxruntime_onnx, one operator of ours with a body, a library
sampler       python, mode bls
vae_decoder   python
pipeline      a model of somebody else, wrong in all that lint says of ours
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from onnx import TensorProto, helper

from treeq_export.records.serve import ServeManifest
from treeq_export.serve.lint import lint_repository

DENOISER, CPU = "denoiser/config.pbtxt", "denoiser/configs/cpu.pbtxt"
SAMPLER, VAE, ENSEMBLE = "sampler/config.pbtxt", "vae_decoder/config.pbtxt", "pipeline/config.pbtxt"
GRAPH = "denoiser/1/model.onnx"
MANIFEST = "manifest.json"
FINAL_ROOT = Path("/srv/final")

# File, or "denoiser" for both its configurations; old text; new text. Without an old text the file
# is written, without a new one it, or the folder, is removed.
Edit = tuple[str, str | None, str | bytes | None]

PYTHON = "class TritonPythonModel:\n    pass\n"
LIBRARY = 'model_operations { op_library_filename: "/srv/final/denoiser/lib/libtreeq_ort.so" }\n'
BATCHING = "dynamic_batching { max_queue_delay_microseconds: 200 }\n"
WARMUP_LABELS = 'data_type: TYPE_INT64 dims: [1] input_data_file: "c"'
LABELS_INPUT = 'name: "class_labels" data_type: TYPE_INT64 dims: [1] reshape { shape: [] }'
NUM_CLASSES = 'parameters { key: "treeq_num_classes" value { string_value: "10" } }\n'
LATENTS = 'name: "latents" data_type: TYPE_FP32 dims: [4, 2, 2]'
IMAGE = 'name: "image" data_type: TYPE_UINT8 dims: [16, 16, 3]'
SAMPLE = 'name: "sample" data_type: TYPE_FP32 dims: [4, 2, 2]'
PREDICTION = 'name: "prediction" data_type: TYPE_FP32 dims: [4, 2, 2]'
VAE_WARMUP = 'model_warmup { batch_size: 1 inputs { key: "latents" value { %s } } }\n'
WARMUP_VALUE = "data_type: TYPE_FP32 dims: [4, 2, 2] zero_data: true"
ENGINE: list[Edit] = [
    ("denoiser", "onnxruntime_onnx", "tensorrt_plan"),
    ("denoiser", LIBRARY, ""),
    ("denoiser/1", None, None),
    ("denoiser/1/model.plan", None, b"engine"),
]


class Wrong(NamedTuple):
    """A repository that is wrong.

    Attributes:
        rule: Id of the rule that finds it.
        words: What its message says, among others.
        edits: What makes it wrong.
        also: Further rules that cannot but see it too.
    """

    rule: str
    words: str
    edits: tuple[Edit, ...]
    also: frozenset[str]


def wrong(rule: str, words: str, *edits: Edit, also: str = "") -> Wrong:
    return Wrong(rule, words, edits, frozenset(also.split()))


def add(text: str, model: str = VAE) -> Edit:
    """Return an edit that adds fields to a configuration."""
    return model, "instance_group", f"{text}\ninstance_group"


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def check_wrong(folder: Path, case: Wrong) -> None:
    """Check that lint finds what is wrong, nothing else, and says so in one line."""
    found = lint_repository(write_repository(folder, case.edits), FINAL_ROOT)
    assert {finding.rule for finding in found} == {case.rule, *case.also}
    messages = [finding.message for finding in found if finding.rule == case.rule]
    assert any(case.words in message for message in messages), messages
    assert all(message.endswith(".") and "\n" not in message for message in messages)


def make_graph(*, batch: str | int = "batch") -> bytes:
    """Return a denoiser."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("treeq", 1)]
    multiply = helper.make_node("Mul", ["x", "s"], ["y"])
    scale = helper.make_function("treeq", "Scale", ["x", "s"], ["y"], [multiply], opsets)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Scale", ["sample", "w"], ["prediction"], domain="treeq")],
        "denoiser",
        [
            value("sample", TensorProto.FLOAT, [batch, 4, 2, 2]),
            value("timestep", TensorProto.FLOAT, [batch]),
            value("class_labels", TensorProto.INT64, [batch]),
        ],
        [
            value("prediction", TensorProto.FLOAT, [batch, 4, 2, 2]),
            value("free", TensorProto.FLOAT, None),
        ],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[scale], ir_version=10)
    return model.SerializeToString()


def _warmup(batch: int) -> str:
    return f"""model_warmup {{
  name: "of {batch}" batch_size: {batch}
  inputs {{ key: "sample" value {{ data_type: TYPE_FP32 dims: [4, 2, 2] random_data: true }} }}
  inputs {{ key: "timestep" value {{ data_type: TYPE_FP32 dims: [1] zero_data: true }} }}
  inputs {{ key: "class_labels" value {{ {WARMUP_LABELS} }} }}
}}
"""


def _denoiser(kind: str) -> str:
    return f"""name: "denoiser"
platform: "onnxruntime_onnx"
max_batch_size: 8
input {{ name: "sample" data_type: TYPE_FP32 dims: [4, 2, 2] }}
input {{ name: "timestep" data_type: TYPE_FP32 dims: [1] reshape {{ shape: [] }} }}
input {{ {LABELS_INPUT} }}
output {{ name: "prediction" data_type: TYPE_FP32 dims: [4, 2, 2] }}
instance_group {{ count: 1 kind: {kind} }}
version_policy {{ latest {{ num_versions: 1 }} }}
{BATCHING}{LIBRARY}{_warmup(1)}{_warmup(2)}{_warmup(8)}"""


FILES: dict[str, str | bytes] = {
    DENOISER: _denoiser("KIND_GPU"),
    CPU: _denoiser("KIND_CPU"),
    "denoiser/lib/libtreeq_ort.so": "a library",
    "denoiser/warmup/c": bytes(8),
    GRAPH: make_graph(),
    SAMPLER: f"""name: "sampler"
backend: "python"
max_batch_size: 8
input {{ name: "label" data_type: TYPE_INT32 dims: [1] }}
input {{ name: "seed" data_type: TYPE_INT64 dims: [1] }}
input {{ name: "steps" data_type: TYPE_INT32 dims: [1] optional: true }}
output {{ name: "latents" data_type: TYPE_FP32 dims: [4, 2, 2] }}
output {{ name: "image" data_type: TYPE_UINT8 dims: [16, 16, 3] }}
output {{ name: "step" data_type: TYPE_INT32 dims: [1] }}
instance_group {{ count: 1 kind: KIND_CPU }}
parameters {{ key: "treeq_mode" value {{ string_value: "bls" }} }}
parameters {{ key: "treeq_model" value {{ string_value: "digits" }} }}
{NUM_CLASSES}parameters {{ key: "treeq_steps" value {{ string_value: "20" }} }}
parameters {{ key: "treeq_guidance" value {{ string_value: "1.5" }} }}
parameters {{ key: "treeq_vae" value {{ string_value: "vae_decoder" }} }}
""",
    "sampler/1/model.py": PYTHON,
    VAE: """name: "vae_decoder"
backend: "python"
max_batch_size: 4
input { name: "latents" data_type: TYPE_FP32 dims: [4, 2, 2] }
output { name: "image" data_type: TYPE_UINT8 dims: [16, 16, 3] }
instance_group { count: 1 }
""",
    "vae_decoder/1/model.py": PYTHON,
    ENSEMBLE: """name: "other"
platform: "ensemble"
output { name: "picture" data_type: TYPE_BF16 label_filename: "none.txt" }
instance_group { gpus: [0] }
dynamic_batching { priority_levels: 2 }
""",
    MANIFEST: ServeManifest(
        treeq_version="1",
        name="digits",
        plan_sha256={},
        target="ort",
        mode="bls",
        backend="onnxruntime",
        backend_version="1",
        root=None,
        gpu=None,
        denoiser=ServeManifest.Denoiser(profile={"min": 1, "opt": 2, "max": 8}),
        models={},
        packages={},
        files={},
    ).model_dump_json(indent=2),
    "README.md": "",
}


def write_repository(root: Path, edits: Iterable[Edit] = ()) -> Path:
    """Write the repository with edits; an edit whose old text is not there is a mistake."""
    for name, content in FILES.items():
        _write(root / name, content)
    for name, old, new in edits:
        for file in (DENOISER, CPU) if name == "denoiser" and old is not None else (name,):
            _edit(root / file, old, new)
    return root


def _edit(path: Path, old: str | None, new: str | bytes | None) -> None:
    if old is not None:
        text = path.read_text()
        assert old in text, f"{path}: no {old!r}"
        assert isinstance(new, str)
        path.write_text(text.replace(old, new))
    elif new is not None:
        _write(path, new)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
