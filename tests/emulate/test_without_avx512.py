"""The emulation hides AVX-512 from ONNX Runtime, and tells the other libraries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulate.without_avx512 import environment, file_offset, missing

# Pairs of products beyond 16 bits: ONNX Runtime's uint8 x int8 kernel for AVX2 cuts them off.
SCRIPT = """
import json
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto as T, helper
from treeq_export.runners.cpu_kernels import read_isa
w = np.full((64, 32), 127, np.int8)
graph = helper.make_graph(
    [helper.make_node("MatMulInteger", ["a", "w"], ["y"])], "product",
    [helper.make_tensor_value_info("a", T.UINT8, [16, 64])],
    [helper.make_tensor_value_info("y", T.INT32, [16, 32])],
    [onnx.numpy_helper.from_array(w, "w")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"])
y = session.run(None, {"a": np.full((16, 64), 255, np.uint8)})[0]
print(json.dumps([read_isa(), int(y.min()), int(y.max())]))
"""


@pytest.mark.slow
def test_onnx_runtime_saturates_as_on_avx2():
    if reason := missing():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["avx2", 32 * 32767, 32 * 32767]


def test_an_address_outside_of_all_segments_is_refused():
    with pytest.raises(ValueError, match="0x10 is in no segment"):
        file_offset(bytes(64), 0x10)
