"""Probe gradients against differences of the real network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from treeq_export.model.layers import discover_linears
from treeq_export.model.replay import BlockReplay, Output, block_names
from treeq_export.model.sensitivity import prediction_error, probe_gradients
from treeq_export.model.zoo import Denoiser
from treeq_export.search.prepare import record_outputs
from treeq_export.search.store import slice_output

FAMILIES = ("dit", "pixart", "sd3", "flux")
ROWS, PROBES = 3, 5
STEP = 1e-2


def make_rows(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return dict(denoiser.make_example_inputs(ROWS, seed=1))


def record(denoiser: Denoiser, names: list[str]) -> tuple[list[Output], torch.Tensor]:
    found: list[Output] = []
    with BlockReplay(denoiser, names) as replay:
        (prediction,) = replay.run(
            make_rows(denoiser), on_output=lambda _, output: found.append(output)
        )
    assert prediction is not None
    return found, prediction


def run_behind(denoiser: Denoiser, names: list[str], block: int, output: Output) -> torch.Tensor:
    """The prediction where a block returns the given output."""
    clean, _ = record(denoiser, names)
    with BlockReplay(denoiser, names) as replay:
        (prediction,) = replay.run(
            make_rows(denoiser),
            first=block + 1,
            recorded=lambda index: output if index == block else clean[index],
        )
    assert prediction is not None
    return prediction.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_see_what_an_error_does_to_the_prediction(
    family: str, make_tiny_denoiser: Callable[..., Denoiser]
):
    denoiser = make_tiny_denoiser(family)
    names = block_names(discover_linears(denoiser))
    rows = make_rows(denoiser)
    trained = [parameter.requires_grad for parameter in denoiser.model.parameters()]
    probes = probe_gradients(denoiser, names, rows, num_probes=PROBES, batch_rows=ROWS, seed=4)
    assert [parameter.requires_grad for parameter in denoiser.model.parameters()] == trained
    outputs: list[Output] = []
    with BlockReplay(denoiser, names) as replay:
        (prediction,) = replay.run(rows, on_output=lambda _, output: outputs.append(output))
    assert prediction is not None
    generator = torch.Generator().manual_seed(4)
    signs = [
        (torch.randint(0, 2, prediction.shape, generator=generator) * 2 - 1).float()
        for _ in range(PROBES)
    ]
    for block, output in enumerate(outputs[:-1]):
        torch.manual_seed(block)
        error = tuple(None if x is None else torch.randn_like(x) for x in output)
        moved = []
        for step in (STEP, -STEP):
            shifted = tuple(
                None if x is None or e is None else x + step * e
                for x, e in zip(output, error, strict=True)
            )
            with BlockReplay(denoiser, names) as replay:
                (found,) = replay.run(
                    rows,
                    first=block + 1,
                    recorded=lambda index, at=block, new=shifted: (
                        new if index == at else outputs[index]
                    ),
                )
            assert found is not None
            moved.append(found)
        change = (moved[0] - moved[1]) / (2 * STEP)
        for k, sign in enumerate(signs):
            expected = (sign * change).flatten(1).sum(dim=1)
            along = sum(
                (g[:, k] * e).flatten(1).sum(dim=1)
                for g, e in zip(probes[block], error, strict=True)
                if g is not None and e is not None
            )
            assert isinstance(along, torch.Tensor)
            size = float(expected.abs().max())
            assert torch.allclose(along, expected, rtol=0.02, atol=0.02 * size), (block, k)


def test_many_probes_estimate_the_error_of_the_prediction(
    make_tiny_denoiser: Callable[..., Denoiser],
):
    denoiser = make_tiny_denoiser("dit")
    names = block_names(discover_linears(denoiser))
    rows = make_rows(denoiser)
    outputs, prediction = record(denoiser, names)
    torch.manual_seed(0)
    (output,) = outputs[0]
    assert output is not None
    error = 1e-2 * torch.randn_like(output)
    moved = run_behind(denoiser, names, 0, (output + error,))
    expected = float((moved - prediction.double()).square().mean())
    found = []
    for batch_rows in (ROWS, 2):
        probes = probe_gradients(
            denoiser, names[:1], rows, num_probes=300, batch_rows=batch_rows, seed=0
        )
        batches = range(0, ROWS, batch_rows)
        found.append(
            prediction_error(
                [slice_output(probes[0], at, batch_rows) for at in batches],
                [(error[at : at + batch_rows],) for at in batches],
                prediction.numel(),
            )
        )
    assert found == pytest.approx([expected, expected], rel=0.15)
    assert found[0] != found[1]  # other directions


def test_what_the_prediction_does_not_depend_on_has_no_gradient(
    make_tiny_denoiser: Callable[..., Denoiser],
):
    """SD3's last block returns no text; the text behind the last but one still counts."""
    denoiser = make_tiny_denoiser("sd3")
    names = block_names(discover_linears(denoiser))
    probes = probe_gradients(
        denoiser, names, make_rows(denoiser), num_probes=2, batch_rows=2, seed=0
    )
    outputs, _ = record(denoiser, names)
    for gradients, output in zip(probes, outputs, strict=True):
        assert [g is None for g in gradients] == [x is None for x in output]
        for g, x in zip(gradients, output, strict=True):
            if g is not None and x is not None:
                assert g.shape == (ROWS, 2, *x.shape[1:])
                assert float(g.abs().sum()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_same_bits_as_memory(
    family: str, make_tiny_denoiser: Callable[..., Denoiser], tmp_path: Path
):
    denoiser = make_tiny_denoiser(family)
    names = block_names(discover_linears(denoiser))
    rows = make_rows(denoiser)
    made: list[list[Output]] = []
    for folder in (None, tmp_path):
        with BlockReplay(denoiser, names) as replay:
            outputs, _ = record_outputs(replay, rows, 2, folder)
        probes = probe_gradients(
            denoiser, names, rows, num_probes=2, batch_rows=2, seed=4, folder=folder
        )
        made.append([*outputs, *probes])
    clean, _ = record(denoiser, names)
    assert len(made[0]) == len(made[1]) == 2 * len(names)
    for output, other in zip(*made, strict=True):
        for x, y in zip(output, other, strict=True):
            assert (x is None) == (y is None)
            assert x is None or y is None or torch.equal(x, y)
    for output, other in zip(made[1][: len(names)], clean, strict=True):
        for x, y in zip(output, other, strict=True):
            assert x is None or y is None or torch.allclose(x, y, atol=1e-5)
    assert not list(tmp_path.iterdir())
