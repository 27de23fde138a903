"""Requests, conditioning files and pictures, without a server."""

import io
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from treeq_export.client.images import ImageOrder
from treeq_export.client.inputs import (
    load_conditioning,
    make_inputs,
    pick_prompt,
    zero_conditioning,
)
from treeq_export.client.picture import to_png
from treeq_export.client.sampler import SamplerInfo
from treeq_export.errors import ServeError

CONTROLS = {"seed": (1,), "steps": (1,), "guidance": (1,), "preview_every": (1,)}
TEXT = {"encoder_hidden_states": (-1, 4), "pooled_projections": (5,)}


def make_info(**changes: Any) -> SamplerInfo:
    values: dict[str, Any] = {
        "name": "sampler",
        "version": "1",
        "model": "digits",
        "mode": "inprocess",
        "target": "ort",
        "num_classes": 10,
        "steps": 20,
        "guidance": 1.5,
        "max_batch": 4,
        "decoupled": False,
        "inputs": {"label": (1,), **CONTROLS},
        "outputs": {"latents": (1, 8, 8), "image": (8, 8, 1), "step": (1,)},
    }
    return SamplerInfo(**values | changes)


DIGITS = make_info()
STREAM = make_info(decoupled=True)
FLUX = make_info(num_classes=None, inputs={**TEXT, **CONTROLS})


def prompts(num: int = 3, tokens: int = 6) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "encoder_hidden_states": rng.standard_normal((num, tokens, 4)).astype(np.float32),
        "pooled_projections": rng.standard_normal((num, 5)).astype(np.float32),
    }


def test_inputs_of_a_class_conditional_model():
    inputs = make_inputs(DIGITS, label=7, seed=[1, 2], steps=5, guidance=2.0)
    assert {name: (a.dtype.name, a.tolist()) for name, a in inputs.items()} == {
        "label": ("int32", [[7], [7]]),
        "seed": ("int64", [[1], [2]]),
        "steps": ("int32", [[5], [5]]),
        "guidance": ("float32", [[2.0], [2.0]]),
    }
    assert list(make_inputs(DIGITS, label=[1, 2], seed=[1, 2])) == ["label", "seed"]
    assert make_inputs(STREAM, label=1, preview_every=5)["preview_every"].tolist() == [[5]]
    assert make_inputs(DIGITS, label=0, seed=2**63 - 1)["seed"] == 2**63 - 1


def test_inputs_of_a_text_model():
    inputs = make_inputs(FLUX, seed=[4, 5], guidance=0.0, conditioning=pick_prompt(prompts(), 2))
    assert inputs["encoder_hidden_states"].shape == (2, 6, 4)
    np.testing.assert_array_equal(
        inputs["pooled_projections"], prompts()["pooled_projections"][[2, 2]]
    )
    zeros = zero_conditioning(FLUX)
    assert zeros is not None
    assert {name: array.shape for name, array in zeros.items()} == {
        "encoder_hidden_states": (1, 1, 4),
        "pooled_projections": (1, 5),
    }
    assert zero_conditioning(DIGITS) is None


@pytest.mark.parametrize(
    ("info", "values", "line"),
    [
        (DIGITS, {"label": 12}, "label: received 12, expected 0..9. digits has 10 classes."),
        (DIGITS, {"label": -1}, "label: received -1, expected 0..9. digits has 10 classes."),
        (
            DIGITS,
            {},
            "label: digits is class-conditional. Give --label 0..9, and no conditioning.",
        ),
        (DIGITS, {"label": [1, 2]}, "label: received 2 labels, expected one or 1."),
        (DIGITS, {"label": 1, "seed": -1}, "seed: received -1, expected 0 or more."),
        (DIGITS, {"label": 1, "seed": 2**63}, f"seed: received {2**63}, expected 0 or more."),
        (DIGITS, {"label": 1, "steps": 0}, "steps: received 0, expected 1 or more."),
        (
            DIGITS,
            {"label": 1, "guidance": 0.5},
            "guidance: received 0.5, expected a finite number >= 1; the server's default is 1.5.",
        ),
        (
            DIGITS,
            {"label": 1, "guidance": math.nan},
            "guidance: received nan, expected a finite number >= 1; the server's default is 1.5.",
        ),
        (
            DIGITS,
            {"label": 1, "seed": range(5)},
            "images: received 5, expected 1..4 in one request. Send several requests.",
        ),
        (
            DIGITS,
            {"label": 1, "preview_every": 5},
            (
                "preview_every: sampler does not stream. Write its repository with "
                "`treeq-export serve --decoupled`, or leave --preview-every out."
            ),
        ),
        (
            FLUX,
            {"label": 1},
            (
                "conditioning: digits is a text model. Give --conditioning FILE with "
                "encoder_hidden_states, pooled_projections, and no label."
            ),
        ),
        (
            make_info(inputs={"label": (1,), "seed": (1,)}),
            {"label": 1, "steps": 5},
            "steps: sampler has no such input. Leave it out.",
        ),
    ],
)
def test_what_is_refused_before_it_is_sent(info: SamplerInfo, values: dict[str, Any], line: str):
    with pytest.raises(ServeError) as caught:
        make_inputs(info, **values)
    assert str(caught.value) == line
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_conditioning_file(tmp_path: Path, dtype: Any):
    path = tmp_path / "prompts.safetensors"
    save_file({name: array.astype(dtype) for name, array in prompts().items()}, path)
    rows = load_conditioning(path, FLUX)
    assert {name: array.dtype.name for name, array in rows.items()} == dict.fromkeys(
        TEXT, "float32"
    )
    assert pick_prompt(rows, 2)["pooled_projections"].shape == (1, 5)
    with pytest.raises(ServeError, match=r"^prompt: received 3, expected 0..2. The file holds 3"):
        pick_prompt(rows, 3)


def test_wrong_conditioning_files(tmp_path: Path):
    path = tmp_path / "prompts.safetensors"
    good = prompts()
    bad: dict[str, dict[str, Any]] = {
        "received pooled_projections, expected enc": {"pooled_projections": np.zeros((1, 5))},
        r"received shape \(3, 9\), expected \(prompts, 5\)": good
        | {"pooled_projections": np.zeros((3, 9))},
        "holds NaN or infinity": good | {"pooled_projections": np.full((3, 5), np.nan)},
        "different numbers of prompts": good | {"pooled_projections": np.zeros((2, 5))},
    }
    for line, tensors in bad.items():
        save_file(tensors, path)
        with pytest.raises(ServeError, match=line):
            load_conditioning(path, FLUX)
    path.write_text("no safetensors")
    with pytest.raises(ServeError, match="Give a safetensors file with"):
        load_conditioning(path, FLUX)
    with pytest.raises(ServeError, match="Give a safetensors file with"):
        load_conditioning(tmp_path / "missing", FLUX)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_keeps_its_pixels_and_says_how_it_was_made(channels: int):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, channels)).astype(np.uint8)
    data = to_png(pixels, {"seed": 3, "label": None, "url": "http://x:1"}, scale=4)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.info == {"seed": "3", "url": "http://x:1"}
        array = np.asarray(picture).reshape(32, 24, channels)
    np.testing.assert_array_equal(array[::4, ::4], pixels)
    np.testing.assert_array_equal(array[3::4, 3::4], pixels)
    with Image.open(io.BytesIO(to_png(pixels))) as picture:
        assert picture.size == (43 * 6, 43 * 8)  # at least 256 in both


def test_what_is_no_picture():
    with pytest.raises(ServeError, match=r"^image: received float32 \(8, 8, 1\), expected uint8"):
        to_png(np.zeros((8, 8, 1), np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ServeError, match=r"^image: received uint8 \(8, 8, 2\)"):
        to_png(np.zeros((8, 8, 2), np.uint8))
    with pytest.raises(ServeError, match=r"^scale: received 0, expected 1 or more"):
        to_png(np.zeros((8, 8, 1), np.uint8), scale=0)


def test_names_of_files():
    one, many = ImageOrder(out=Path("a/x.png")), ImageOrder(out=Path("a/x"), num=2)
    assert str(one.file(4)) == "a/x.png"
    assert str(one.file(4, 5)) == "a/x.step005.png"
    assert str(many.file(4)) == "a/x.seed4.png"
    assert str(many.file(4, 12)) == "a/x.seed4.step012.png"
