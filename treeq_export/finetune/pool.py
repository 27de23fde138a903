"""A pool of trajectories that training walks along, one step of the sampler at a time.

Every training step takes a batch of states from the pool. Teacher and student predict from them,
and one of the predictions moves each state on to the next timestep, at no further cost. Where the
teacher's does, the states are those of full precision; where the student's does, they are those
that the quantized model itself will meet, with its own errors so far, and the teacher says what it
would have answered there (as in DAgger: Ross et al., 2011). A state at the end of its trajectory is
replaced by new noise, so no data is stored and none is seen twice.

Both samplers are linear in state and prediction, x <- a x + b v, with a and b of each step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep
from treeq_export.recipe import SamplerSection
from treeq_served.denoise import make_scheduler

_NOISE_STREAM = 3  # keeps these trajectories apart from those that calibrate and evaluate take

Predict = Callable[[dict[str, Tensor]], tuple[Tensor, list[Tensor]]]


class TrajectoryPool:
    """States on trajectories of their own, at timesteps spread over the whole schedule.

    Args:
        denoiser: Gives shapes and conditioning.
        section: The sampler.
        size: Number of states.
        on_policy: Fraction of trajectories that follow the student.
        seed: Seed of all noise and of random conditioning.
    """

    def __init__(
        self, denoiser: Denoiser, section: SamplerSection, size: int, on_policy: float, seed: int
    ) -> None:
        self.denoiser = denoiser
        self.section = section
        self.on_policy = on_policy
        self.seed = seed
        self.timesteps, self.coefficients = schedule_of(section)
        self.conditioning = denoiser.make_conditioning(size, seed)
        self.numbers = torch.arange(size)
        self.positions = torch.zeros(size, dtype=torch.int64)
        self.states = torch.stack([self._noise(number) for number in range(size)])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a training in progress has to keep."""
        return {"numbers": self.numbers, "positions": self.positions, "states": self.states}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self.numbers, self.positions = tensors["numbers"].clone(), tensors["positions"].clone()
        self.states = tensors["states"].clone()

    def spread(self, predict: Predict, batch_size: int, on_step: OnStep) -> None:
        """Move state i to step i of the schedule (modulo its length) along full precision.

        Args:
            predict: The teacher's prediction and block outputs; the latter are not looked at.
            batch_size: States per call.
            on_step: Called with the fraction done, 0..1.
        """
        steps = len(self.timesteps)
        target = torch.arange(len(self.states)) % steps
        for position in range(steps - 1):
            behind = torch.nonzero(target > position)[:, 0]
            for slots in behind.split(batch_size):
                with torch.no_grad():
                    prediction, _ = predict(self.inputs(slots))
                self.move(slots, prediction)
            on_step((position + 1) / steps)

    def inputs(self, slots: Tensor) -> dict[str, Tensor]:
        """Return network inputs for these states; with guidance also the unconditional half."""
        rows = {name: tensor[slots] for name, tensor in self.conditioning.items()}
        states, times = self.states[slots], self.timesteps[self.positions[slots]]
        if self.section.guidance_scale != 1.0:
            null = self.denoiser.null_conditioning(len(slots))
            rows = {name: torch.cat([rows[name], null[name]]) for name in null}
            states, times = torch.cat([states, states]), torch.cat([times, times])
        return {"sample": states, "timestep": times, **rows}

    def follows_student(self, slots: Tensor) -> Tensor:
        """Return which of these trajectories follow the student, (slots,) bool."""
        golden = 0.6180339887498949  # spreads any fraction evenly over the trajectories
        return (self.numbers[slots].double() * golden) % 1.0 < self.on_policy

    def advance(self, slots: Tensor, teacher: Tensor, student: Tensor) -> None:
        """Move these states on, each by the prediction that its trajectory follows."""
        follows = self.follows_student(slots)
        if self.section.guidance_scale != 1.0:
            follows = torch.cat([follows, follows])
        shape = (-1, *[1] * (teacher.ndim - 1))
        self.move(slots, torch.where(follows.reshape(shape), student, teacher))

    def move(self, slots: Tensor, prediction: Tensor) -> None:
        """Take one sampler step; states at the end become new noise.

        Args:
            slots: Which states, (n,).
            prediction: (n, *sample_shape), or (2 n, ...) with guidance.
        """
        scale = self.section.guidance_scale
        if scale != 1.0:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + scale * (conditional - unconditional)
        keep, add = self.coefficients[self.positions[slots]].unbind(dim=1)
        shape = (-1, *[1] * (prediction.ndim - 1))
        moved = keep.reshape(shape) * self.states[slots] + add.reshape(shape) * prediction
        self.states[slots] = moved
        self.positions[slots] += 1
        for slot in slots[self.positions[slots] == len(self.timesteps)].tolist():
            self.numbers[slot] += len(self.numbers)
            self.positions[slot] = 0
            self.states[slot] = self._noise(int(self.numbers[slot]))

    def _noise(self, number: int) -> Tensor:
        rng = np.random.default_rng([_NOISE_STREAM, self.seed, number])
        noise = rng.standard_normal(self.denoiser.sample_shape, dtype=np.float32)
        return torch.from_numpy(noise)


def schedule_of(section: SamplerSection) -> tuple[Tensor, Tensor]:
    """Return the timesteps (steps,) and the coefficients a, b of each step, (steps, 2) float32."""
    scheduler: Any = make_scheduler(section.definition, section.steps)
    probe = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # state and prediction of two samples
    coefficients = [
        scheduler.step(probe[1], timestep, probe[0], return_dict=False)[0]
        for timestep in scheduler.timesteps
    ]
    times = torch.tensor([float(timestep) for timestep in scheduler.timesteps])
    return times, torch.stack(coefficients).to(torch.float32)
