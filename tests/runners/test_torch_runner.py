from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from treeq_export.model.zoo import Denoiser
from treeq_export.runners.torch_runner import TorchRunner

MakeDenoiser = Callable[..., Denoiser]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_runs_inputs_by_name_in_any_order(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit")
    inputs = denoiser.make_example_inputs(2, seed=0)
    arrays = {name: inputs[name].numpy() for name in reversed(denoiser.input_names)}
    with TorchRunner(denoiser) as runner:
        assert runner.input_names == denoiser.input_names
        from_tensors, from_arrays = runner.run(inputs), runner.run(arrays)
    with torch.no_grad():
        expected = denoiser(*inputs.values()).numpy()
    np.testing.assert_array_equal(from_tensors, expected)
    np.testing.assert_array_equal(from_arrays, expected)
    assert from_tensors.dtype == np.float32


def test_threads_are_restored(make_tiny_denoiser: MakeDenoiser):
    runner = TorchRunner(make_tiny_denoiser("dit"), threads=2)
    assert torch.get_num_threads() == 1
    with runner:
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), runner:
        runner.run({})
    assert torch.get_num_threads() == 1


def test_threads_none_leaves_them(make_tiny_denoiser: MakeDenoiser):
    with TorchRunner(make_tiny_denoiser("dit")):
        assert torch.get_num_threads() == 1


def test_entering_ends_training_mode(make_tiny_denoiser: MakeDenoiser):
    denoiser = make_tiny_denoiser("dit").train()
    with TorchRunner(denoiser):
        assert not denoiser.training
