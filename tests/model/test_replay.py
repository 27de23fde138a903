"""Running a range of blocks on recorded inputs gives what the whole network gives, bit for bit."""

from collections.abc import Callable

import pytest
import torch

from treeq_export.model.layers import discover_linears
from treeq_export.model.replay import BlockReplay, Output, block_names
from treeq_export.model.zoo import Denoiser

MakeDenoiser = Callable[..., Denoiser]
FAMILIES = ("dit", "pixart", "sd3", "flux")


def same(one: Output, other: Output) -> bool:
    assert len(one) == len(other)
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_range_gives_what_the_whole_network_gives(
    family: str, make_tiny_denoiser: MakeDenoiser
):
    denoiser = make_tiny_denoiser(family)
    names = block_names(discover_linears(denoiser))
    inputs = denoiser.make_example_inputs(3, seed=1)
    with torch.no_grad():
        expected = denoiser.prediction(denoiser(*inputs.values()))
    assert len(names) == 2
    with BlockReplay(denoiser, names) as replay:
        outputs: dict[int, Output] = {}
        (prediction,) = replay.run(inputs, on_output=outputs.__setitem__)
        assert prediction is not None
        assert torch.equal(prediction, expected)
        assert sorted(outputs) == [0, 1]
        for first in (0, 1):
            (again,) = replay.run(inputs, first=first, recorded=outputs.__getitem__)
            assert again is not None
            assert torch.equal(again, expected)
            for last in range(first, 2):
                seen: list[int] = []
                ended = replay.run(
                    inputs,
                    first=first,
                    last=last,
                    recorded=outputs.__getitem__,
                    on_output=lambda block, _, seen=seen: seen.append(block),
                )
                assert same(ended, outputs[last])
                assert seen == list(range(first, last + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_outputs_are_what_the_rest_runs_on(family: str, make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser(family)
    names = block_names(discover_linears(denoiser))
    one, other = (denoiser.make_example_inputs(2, seed=seed) for seed in (1, 2))
    with BlockReplay(denoiser, names) as replay:
        outputs: dict[int, Output] = {}
        replay.run(one, on_output=outputs.__setitem__)
        clean = replay.run(other)
        mixed = replay.run(other, first=1, recorded=outputs.__getitem__)
    assert not same(clean, mixed)


def test_the_model_is_as_before_afterwards(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    names = block_names(discover_linears(denoiser))
    with BlockReplay(denoiser, names):
        assert all("forward" in vars(denoiser.model.get_submodule(name)) for name in names)
    assert not any("forward" in vars(module) for module in denoiser.modules())


def test_blocks_before_the_range_need_a_record(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    names = block_names(discover_linears(denoiser))
    with (
        BlockReplay(denoiser, names) as replay,
        pytest.raises(ValueError, match="block 0 lies before the range"),
    ):
        replay.run(denoiser.make_example_inputs(1, seed=0), first=1)
