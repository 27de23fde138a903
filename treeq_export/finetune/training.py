"""The training loop: AdamW with warm-up and cosine, held-out measurements, early stop, resume.

Everything that a step does follows from the section, the seed and the state in `Training`; that
state is saved at every held-out measurement, so a killed run goes on from there and ends with the
same bytes as one that was not killed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from treeq_export.errors import TreeqError
from treeq_export.finetune.distill import Watched, distillation_loss
from treeq_export.finetune.pool import TrajectoryPool
from treeq_export.finetune.student import trainable_layers
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.progress import OnStep
from treeq_export.recipe import FinetuneSection

_BETAS = (0.9, 0.99)  # the second moment follows within the few hundred steps there are


@dataclass
class Progress:
    """What is known of a training so far.

    Attributes:
        step: Optimizer steps done.
        best_step: Step of the least held-out error.
        curve: Measurements, fields of `records.FinetunePoint`.
        losses: Loss of every step since the last measurement.
    """

    step: int = 0
    best_step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best_mse(self) -> float:
        """The least held-out error."""
        return min((point["held_out_mse"] for point in self.curve), default=math.inf)


class Training:
    """A student, its teacher and optimizer, and the progress of its training.

    Args:
        teacher: The full-precision model.
        student: The result of `make_student`.
        blocks: Names of the blocks whose outputs are compared.
        pool: The source of the training states.
        held_out: Network inputs that are never trained on.
        section: The recipe's finetune section.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        blocks: list[str],
        pool: TrajectoryPool,
        held_out: Rows,
        section: FinetuneSection,
    ) -> None:
        self.teacher, self.student = Watched(teacher, blocks), Watched(student, blocks)
        self.pool, self.held_out, self.section = pool, held_out, section
        self.parameters = {
            f"{layer}.{name}": parameter
            for layer, module in trainable_layers(student).items()
            for name, parameter in module.trained.items()
        }
        self.optimizer = torch.optim.AdamW(
            self._groups(), betas=_BETAS, weight_decay=0.0, foreach=True
        )
        self.progress = Progress()
        self.best = self._copy_parameters()

    def _groups(self) -> list[dict[str, Any]]:
        rates = {
            "branch_R": self.section.branch_lr,
            "branch_L": self.section.branch_lr,
            "weight_scale": self.section.scale_lr,
            "activation_step": self.section.scale_lr,
            "bias": self.section.bias_lr,
            "codes": self.section.weight_lr,
        }
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(name.rpartition(".")[2], []).append(parameter)
        return [
            {"params": parameters, "lr": rates[kind], "full_lr": rates[kind]}
            for kind, parameters in groups.items()
        ]

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def run(self, on_step: OnStep, save: Callable[[], None]) -> bool:
        """Train to the last step or until patience runs out; leave the best parameters in place.

        Args:
            on_step: Called with the fraction done, 0..1.
            save: Called after every measurement but the last.

        Returns:
            Whether it stopped early.

        Raises:
            TreeqError: The loss is not finite.
        """
        section, progress = self.section, self.progress
        if not progress.curve:
            self._measure()
        stopped = False
        while progress.step < section.steps and not stopped:
            self._take_step()
            if progress.step % section.check_every == 0 or progress.step == section.steps:
                self._measure()
                stopped = self._is_out_of_patience()
                if progress.step < section.steps and not stopped:
                    save()
            on_step(progress.step / section.steps)
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)
        return stopped

    def _is_out_of_patience(self) -> bool:
        since = [p for p in self.progress.curve if p["step"] > self.progress.best_step]
        return len(since) >= self.section.patience and self.progress.step < self.section.steps

    def _take_step(self) -> None:
        section, progress = self.section, self.progress
        slots = (torch.arange(section.batch_size) + progress.step * section.batch_size) % len(
            self.pool.states
        )
        inputs = self.pool.inputs(slots)
        with torch.no_grad():
            target = self.teacher(inputs)
        found = self.student(inputs)
        loss = distillation_loss(target, found, section.block_weight)
        progress.losses.append(self._check(loss.item()))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), section.clip_norm)
        factor = rate_factor(progress.step, section.steps, section.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        self.optimizer.step()
        with torch.no_grad():
            self.pool.advance(slots, target[0], found[0].detach())
        progress.step += 1

    def _check(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TreeqError(
                f"finetune: received loss {loss} at step {self.progress.step + 1}, expected a "
                "finite one. Lower the learning rates of the recipe's finetune section (branch_lr "
                f"{self.section.branch_lr:g}, scale_lr {self.section.scale_lr:g})."
            )
        return loss

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure on the held-out rows and keep the parameters if they are the best so far."""
        progress, size = self.progress, self.section.batch_size
        num_rows = len(self.held_out["sample"])
        losses, errors = 0.0, 0.0
        for start in range(0, num_rows, size):
            inputs = {name: rows[start : start + size] for name, rows in self.held_out.items()}
            target, found = self.teacher(inputs), self.student(inputs)
            share = len(inputs["sample"]) / num_rows
            losses += share * distillation_loss(target, found, self.section.block_weight).item()
            errors += share * (found[0] - target[0]).square().mean().item()
        best = progress.best_mse
        point = {
            "step": progress.step,
            "train_loss": math.fsum(progress.losses) / len(progress.losses)
            if progress.losses
            else None,
            "held_out_loss": losses,
            "held_out_mse": self._check(errors),
        }
        progress.losses.clear()
        progress.curve.append(point)
        if errors < best:
            progress.best_step = progress.step
            self.best = self._copy_parameters()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that training goes on from."""
        optimizer = {
            f"optimizer.{index}.{name}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        return {
            **{f"parameters.{name}": p.detach() for name, p in self.parameters.items()},
            **{f"best.{name}": value for name, value in self.best.items()},
            **{f"pool.{name}": value for name, value in self.pool.state_dict().items()},
            **optimizer,
        }

    def load_state(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Take up what `state` returned, with the progress of that time."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        with torch.no_grad():
            for name, value in parts["parameters"].items():
                self.parameters[name].copy_(value)
        self.best = parts["best"]
        self.pool.load_state_dict(parts["pool"])
        full = self.optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            index, _, short = name.partition(".")
            full["state"].setdefault(int(index), {})[short] = tensor
        self.optimizer.load_state_dict(full)
        self.progress = progress


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of a step over the largest: a linear rise times half a cosine.

    >>> [round(rate_factor(step, 4, 0.5), 2) for step in range(4)]
    [0.5, 0.85, 0.5, 0.15]
    """
    rise = max(round(warmup * steps), 1)
    fall = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return min((step + 1) / rise, 1.0) * fall
