"""The int32 sums of every target, for codes at the ends of their ranges, on this processor."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.hand_layers import lower
from tests.required import skip_or_fail
from treeq_export.compile.audits.sums import extreme_codes
from treeq_export.quant.numerics import accumulate
from treeq_export.runners.graph_meta import read_layers
from treeq_export.runners.layer_probe import LayerProbe
from treeq_export.runners.products import make_product
from treeq_export.targets.names import TENSORRT_NATIVE
from treeq_export.targets.table import target_named
from treeq_served import ort_session

Make = Callable[..., Any]
# (weight bits, activation bits)
FORMATS = [(8, 8), (8, 7), (8, 4), (8, 3), (8, 2), (7, 8), (7, 7), (6, 8), (4, 8), (2, 8)]
K, ROWS = 72, 9
FORMS = {
    "portable": ("portable", None),
    "portable by groups": ("portable", 24),
    "ort body": ("ort", None),
    "ort body by groups": ("ort", 24),
    "tensorrt": ("tensorrt", None),
    "tensorrt-native": (TENSORRT_NATIVE, None),
}
CASES = [(form, *bits) for form in FORMS for bits in FORMATS]
EMULATOR, CPU = "qemu-x86_64", "Haswell"


def make_probe(
    form: str, weight_bits: int, act_bits: int, make_layer: Make, make_model: Make
) -> tuple[Any, LayerProbe]:
    target, group_size = FORMS[form]
    layer = make_layer(
        weight_bits=weight_bits, act_bits=act_bits, k=K, rotation_group=8, group_size=group_size
    )
    layer.codes = extreme_codes(weight_bits, *layer.codes.shape, seed=1)
    model = lower(make_model(layer), target)
    probe = target_named(target).ways[-1].probe(model, read_layers(model)[0])
    assert isinstance(probe, LayerProbe)
    return layer, probe


@pytest.mark.parametrize(("form", "weight_bits", "act_bits"), CASES)
def test_sums_of_extreme_codes(
    form: str, weight_bits: int, act_bits: int, make_layer: Make, make_model: Make
):
    layer, probe = make_probe(form, weight_bits, act_bits, make_layer, make_model)
    for rows in (1, ROWS):  # one row goes another way through some kernels
        codes = extreme_codes(act_bits, ROWS, K)[-rows:]
        expected = accumulate(codes, layer.codes, layer.weight_scale.shape[1])
        np.testing.assert_array_equal(probe.run_products(codes), expected)


def test_codes_reach_the_ends_of_their_range():
    codes = extreme_codes(8, ROWS, K)
    assert set(codes[0]) == {-128}
    assert set(codes[1]) == {127}
    assert set(codes[2]) == set(codes[3]) == {-128, 127}
    assert len(set(codes[4])) > 20


@pytest.mark.slow
def test_sums_on_a_processor_without_vnni(tmp_path: Path, make_layer: Make, make_model: Make):
    """The emulated processor has AVX2; its ONNX Runtime saturates, but not in our graphs."""
    if shutil.which(EMULATOR) is None or sys.platform != "linux" or not is_x86():
        skip_or_fail("x86-emulator", f"needs {EMULATOR} on x86-64 Linux; `make apt` installs it")
    model, x = make_product()
    (tmp_path / "saturates.onnx").write_bytes(model)
    np.save(tmp_path / "saturates.x.npy", x)
    for form, weight_bits, act_bits in CASES:
        layer, probe = make_probe(form, weight_bits, act_bits, make_layer, make_model)
        keep_int8 = FORMS[form][0] == TENSORRT_NATIVE
        bits = f"w{weight_bits}a{act_bits}"
        name = f"{form.replace(' ', '-')}-{bits}{'.keep_int8' if keep_int8 else ''}"
        ir.save(probe.cut_products(), tmp_path / f"{name}.onnx")
        codes = extreme_codes(act_bits, ROWS, K)[None]
        sums = accumulate(codes, layer.codes, layer.weight_scale.shape[1])
        np.savez(tmp_path / f"{name}.npz", x=codes.astype(np.float32), y=sums)
    packages = {str(Path(str(module.__file__)).parents[1]) for module in (np, onnxruntime)}
    done = subprocess.run(
        [
            *(EMULATOR, "-cpu", CPU),
            *(os.path.realpath(sys.executable), "-S", "-c", RUN_PRODUCTS),
            *(ort_session.__file__, str(tmp_path)),
        ],
        env={"PYTHONPATH": os.pathsep.join(sorted(packages)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["saturates"], "only the plain product is to be wrong there"


def is_x86() -> bool:
    return os.uname().machine == "x86_64"


# What runs in the emulator, which takes minutes to import PyTorch.
RUN_PRODUCTS = """\
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from ort_session import open_session
for path in sorted(Path(sys.argv[2]).glob("*.onnx")):
    session = open_session(
        path, None, threads=1, keep_int8=path.stem.endswith(".keep_int8")
    )
    if path.stem == "saturates":
        [y] = session.run(None, {"x": np.load(path.with_suffix(".x.npy"))})
        exact = (y == y.dtype.type(64 * 255 * 127)).all()
    else:
        saved = np.load(path.with_suffix(".npz"))
        expected = saved["y"]
        exact = True
        for rows in (1, expected.shape[1]):
            [y] = session.run(None, {"x": saved["x"][:, -rows:]})
            y = np.swapaxes(y, -3, -2) if y.ndim == 4 else y[..., None, :]
            exact &= np.array_equal(y, expected[:, -rows:])
    if not exact:
        print(path.stem)
"""
