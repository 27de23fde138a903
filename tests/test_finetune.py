"""The finetune stage: its arithmetic, its loop, its files, and how it goes on after a kill."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from treeq_export.artefacts import sha256_of_file
from treeq_export.errors import OutputError, PlanError, RecipeError, TreeqError
from treeq_export.evaluate.samples import digest_quantized
from treeq_export.finetune.distill import Watched, distillation_loss
from treeq_export.finetune.pool import TrajectoryPool, schedule_of
from treeq_export.finetune.stage import run_finetune
from treeq_export.finetune.student import export_student, make_student, trainable_layers
from treeq_export.finetune.training import rate_factor
from treeq_export.model.quantized import quantize_model, quantized_layers
from treeq_export.model.sampler import sample
from treeq_export.model.trajectories import collect_rows, predict
from treeq_export.plan import load_plan, load_tensors
from treeq_export.quant.grids import INTEGER
from treeq_export.recipe import FinetuneSection, SamplerSection
from treeq_export.records import FinetuneRecord, load_record
from treeq_export.run_folder import RunFolder

KINDS = frozenset({"branch", "weight_scale", "activation_step", "bias"})
QUICK = {
    "steps": 6,
    "batch_size": 4,
    "num_trajectories": 8,
    "check_every": 2,
    "held_out_rows": 6,
}


@pytest.fixture(scope="module")
def tiny(make_tiny_run: Callable[..., Any]) -> Any:
    """The tiny DiT, W3A3 with a rank-4 branch, calibrated. Read-only."""
    return make_tiny_run("dit", weight_bits=3, activation_bits=3)


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> Path:
    """A copy of its run folder."""
    return shutil.copytree(tiny.run, tmp_path / "run")


def finetune(
    tiny: Any, run: Path, on_step: Callable[[float], None] = lambda _: None, **section: Any
) -> FinetuneRecord | None:
    recipe = tiny.recipe.model_copy(
        update={"finetune": FinetuneSection(**{"mode": "peft", **QUICK, **section})}
    )
    return run_finetune(run, tiny.denoiser, tiny.plan, tiny.tensors, recipe, on_step)


class TestStudent:
    @pytest.mark.parametrize(
        ("family", "search"),
        [
            ("dit", {"weight_bits": 3, "activation_bits": 3}),
            ("pixart", {"group_size": 32}),
            (
                "sd3",
                {"activation_scale": "token_absmax", "branch": {"b_in": 2, "b_out": 2, "rank": 4}},
            ),
            ("flux", {"activation_scale": "tensor_static"}),
            ("dit", {"activation_bits": None, "branch": None, "rotation_group": 1}),
        ],
    )
    def test_written_tensors_compute_what_was_trained(
        self, make_tiny_run: Callable[..., Any], family: str, search: dict[str, Any]
    ) -> None:
        tiny = make_tiny_run(family, **search)
        student = make_student(tiny.denoiser, tiny.plan, tiny.tensors, KINDS | {"codes"})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise)
        tensors = tiny.tensors | export_student(student)
        quantized = quantized_layers(quantize_model(tiny.denoiser, tiny.plan, tensors))
        for name, module in trainable_layers(student).items():
            x = torch.randn(5, module.layer.in_features, generator=generator)
            with torch.no_grad():
                expected, found = quantized[name](x), module(x)
            assert (found - expected).norm() < 1e-6 * expected.norm(), name

    def test_starts_as_calibrated(self, tiny: Any) -> None:
        student = make_student(tiny.denoiser, tiny.plan, tiny.tensors, KINDS | {"codes"})
        exported = export_student(student)
        assert {name.split(".", 4)[-1] for name in exported} >= {"codes", "weight_scale"}
        for name, tensor in exported.items():
            if name in tiny.tensors:
                assert tensor.dtype == tiny.tensors[name].dtype
                np.testing.assert_allclose(tensor, tiny.tensors[name], rtol=1e-6, err_msg=name)
        inputs = tiny.denoiser.make_example_inputs(3, seed=5)
        rows = predict(student, inputs, 3)
        expected = predict(quantize_model(tiny.denoiser, tiny.plan, tiny.tensors), inputs, 3)
        assert (rows - expected).norm() < 1e-4 * expected.norm()

    def test_gradients_are_those_of_the_quantized_linear(self, tiny: Any) -> None:
        """QLinear passes gradients straight through as well; both have to agree."""
        student = trainable_layers(make_student(tiny.denoiser, tiny.plan, tiny.tensors, KINDS))
        quantized = quantized_layers(quantize_model(tiny.denoiser, tiny.plan, tiny.tensors))
        name = tiny.plan.layers[1].name
        layer, reference = student[name], quantized[name].requires_grad_()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(7, layer.layer.in_features, generator=generator)
        up = torch.randn(7, layer.layer.out_features, generator=generator)
        own = x.clone().requires_grad_()
        (layer(own) * up).sum().backward()
        theirs = x.clone().requires_grad_()
        (reference(theirs) * up).sum().backward()
        pairs = {
            "x": (own.grad, theirs.grad),
            "bias": (layer.trained["bias"].grad / layer.unit["bias"], reference.bias.grad),
            "R": (layer.trained["branch_R"].grad / layer.unit["branch.R"], reference.branch.R.grad),
            "L": (layer.trained["branch_L"].grad / layer.unit["branch.L"], reference.branch.L.grad),
            "scale": (
                layer.trained["weight_scale"].grad / reference.weight_scale,
                reference.weight_scale.grad,
            ),
            "step": (
                layer.trained["activation_step"].grad / reference.activation_step,
                reference.activation_step.grad,
            ),
        }
        for what, (found, expected) in pairs.items():
            assert (found - expected).norm() < 1e-5 * expected.norm(), what

    def test_scales_stay_positive(self, tiny: Any) -> None:
        student = make_student(tiny.denoiser, tiny.plan, tiny.tensors, KINDS)
        with torch.no_grad():
            for module in trainable_layers(student).values():
                for kind in ("weight_scale", "activation_step"):
                    module.trained[kind].fill_(-20.0)
        for name, tensor in export_student(student).items():
            if name.endswith(("weight_scale", "activation_step")):
                assert (tensor > 0).all()

    def test_latents_move_codes_one_cell_at_a_time(self, tiny: Any) -> None:
        student = make_student(tiny.denoiser, tiny.plan, tiny.tensors, frozenset({"codes"}))
        qmin, qmax = INTEGER.ends(3)
        module = trainable_layers(student)[tiny.plan.layers[0].name]
        latent, before = module.trained["codes"], module.export()["codes"]
        assert np.array_equal(latent.detach().numpy(), before)
        with torch.no_grad():
            latent.add_(1.0)
        after = module.export()["codes"]
        assert np.array_equal(after, np.minimum(before + 1, qmax))
        module.tensor("codes").sum().backward()
        assert (latent.grad == 1).all()  # also at the end of the grid
        assert after.min() >= qmin

    def test_absmax_steps_from_7_bits_on_stay(self, make_tiny_run: Callable[..., Any]) -> None:
        tiny = make_tiny_run("dit", activation_bits=8)
        student = make_student(
            tiny.denoiser, tiny.plan, tiny.tensors, frozenset({"activation_step"})
        )
        assert export_student(student) == {}


class TestPool:
    @pytest.mark.parametrize("scheduler", ["flow_match_euler", "ddim"])
    @pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
    def test_walks_as_the_sampler_does(
        self, tiny: Any, scheduler: Any, guidance_scale: float
    ) -> None:
        section = SamplerSection(
            scheduler=scheduler, steps=3, batch_size=2, guidance_scale=guidance_scale
        )
        pool = TrajectoryPool(tiny.denoiser, section, 2, 0.0, seed=7)
        generator = torch.Generator().manual_seed(7)  # as the sampler draws it
        pool.states = torch.randn((2, *tiny.denoiser.sample_shape), generator=generator)
        seen: list[dict[str, Any]] = []

        def run_and_see(inputs: dict[str, Any]) -> Any:
            seen.append(inputs)
            return tiny.denoiser(*(inputs[name] for name in tiny.denoiser.input_names))

        final = sample(run_and_see, tiny.denoiser, section, num=2, seed=7)
        slots = torch.arange(2)
        for inputs in seen:
            own = pool.inputs(slots)
            for name in tiny.denoiser.input_names:
                assert torch.allclose(own[name], inputs[name], rtol=1e-4, atol=1e-4), name
            before, guided = pool.states.clone(), Watched(tiny.denoiser, [])(own)[0]
            pool.advance(slots, guided, guided * torch.nan)
        if guidance_scale != 1.0:
            conditional, unconditional = guided.chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
        keep, add = pool.coefficients[-1]
        assert torch.allclose(keep * before + add * guided, final, rtol=1e-4, atol=1e-4)
        assert pool.positions.tolist() == [0, 0]  # both begin anew
        assert pool.numbers.tolist() == [2, 3]
        assert not torch.allclose(pool.states, final)

    def test_states_are_spread_over_the_schedule(self, tiny: Any) -> None:
        section = SamplerSection(steps=4)
        pool = TrajectoryPool(tiny.denoiser, section, 6, 0.0, seed=0)
        steps: list[float] = []
        pool.spread(Watched(tiny.denoiser, []), 4, steps.append)
        assert pool.positions.tolist() == [0, 1, 2, 3, 0, 1]
        assert steps == sorted(steps)
        other = TrajectoryPool(tiny.denoiser, section, 6, 0.0, seed=1)
        assert not torch.equal(other.states[0], pool.states[0])

    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.25, 25), (1.0, 100)])
    def test_fraction_that_follows_the_student(
        self, tiny: Any, fraction: float, expected: int
    ) -> None:
        pool = TrajectoryPool(tiny.denoiser, SamplerSection(steps=4), 100, fraction, seed=0)
        follows = pool.follows_student(torch.arange(100))
        assert abs(int(follows.sum()) - expected) <= 2
        teacher = torch.zeros_like(pool.states)
        before = pool.states.clone()
        pool.advance(torch.arange(100), teacher, teacher + 1.0)
        moved = (pool.states != before).flatten(1).any(dim=1)
        assert torch.equal(moved, follows)

    def test_coefficients_of_rectified_flow(self) -> None:
        times, coefficients = schedule_of(SamplerSection(steps=4))
        assert times.tolist() == [1000.0, 750.0, 500.0, 250.0]
        assert torch.allclose(coefficients, torch.tensor([[1.0, -0.25]]).expand(4, 2))


class TestLoss:
    @pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux"])
    def test_sees_every_block(self, make_tiny_denoiser: Callable[..., Any], family: str) -> None:
        denoiser = make_tiny_denoiser(family)
        names = {
            name
            for name, _ in denoiser.model.named_modules()
            if name.rpartition(".")[0].endswith("blocks")
        }
        prediction, outputs = Watched(denoiser, sorted(names))(
            denoiser.make_example_inputs(2, seed=0)
        )
        assert prediction.shape == (2, *denoiser.sample_shape)
        # SD3 and Flux also return the text's hidden states, SD3 not in its last block.
        assert len(outputs) == {"dit": 2, "pixart": 2, "sd3": 3, "flux": 4}[family]
        assert not denoiser.model.transformer_blocks[0]._forward_hooks

    def test_names_of_the_blocks(self, tiny: Any) -> None:
        assert tiny.plan.block_names == ["transformer_blocks.0", "transformer_blocks.1"]

    def test_value(self) -> None:
        one = torch.ones(2, 3)
        teacher = (one, [2 * one, one])
        student = (one * 1.1, [2.2 * one, 1.2 * one])
        loss = distillation_loss(teacher, student, block_weight=2.0)
        assert loss.item() == pytest.approx(0.01 + 2 * (0.01 + 0.04) / 2)
        assert distillation_loss(teacher, student, 0.0).item() == pytest.approx(0.01)

    def test_learning_rate_rises_and_falls(self) -> None:
        factors = [rate_factor(step, 100, 0.1) for step in range(100)]
        assert factors[0] == pytest.approx(0.1)
        assert int(np.argmax(factors)) == 9
        assert factors[-1] < 0.001
        assert rate_factor(0, 10, 0.0) == 1.0


class TestStage:
    def test_lowers_the_held_out_error(self, tiny: Any, run: Path) -> None:
        steps: list[float] = []
        record = finetune(tiny, run, steps.append, steps=40, check_every=10)
        assert record is not None
        assert record == load_record(run / RunFolder.FINETUNE, FinetuneRecord, "finetune")
        assert record.mse_after < 0.8 * record.mse_before
        assert [point.step for point in record.curve] == [0, 10, 20, 30, 40]
        assert record.curve[0].train_loss is None
        assert min(p.held_out_mse for p in record.curve) == record.mse_after
        assert record.steps == 40
        assert not record.stopped_early
        assert steps == sorted(steps)
        assert steps[-1] == 1.0
        assert not (run / RunFolder.FINETUNE_STATE).exists()

    def test_overlay_holds_what_was_trained(self, tiny: Any, run: Path) -> None:
        record = finetune(tiny, run, train=["branch", "bias"])
        assert record is not None
        trained = load_file(run / RunFolder.FINETUNED)
        layers = [layer.name for layer in tiny.plan.layers]
        shorts = ("bias", "branch.L", "branch.R")
        assert sorted(trained) == sorted(f"{name}.{short}" for name in layers for short in shorts)
        assert record.num_trained == sum(tensor.size for tensor in trained.values())
        plan = load_plan(run)
        assert plan == tiny.plan
        tensors = load_tensors(run, plan)
        assert set(tensors) == set(tiny.tensors) | set(trained)
        for name, tensor in tensors.items():
            assert np.array_equal(tensor, trained.get(name, tiny.tensors.get(name)))
        base = load_tensors(run, plan, finetuned=False)
        assert all(np.array_equal(base[name], tiny.tensors[name]) for name in tiny.tensors)
        assert set(base) == set(tiny.tensors)

    def test_qat_finds_codes_and_measures_what_it_writes(self, tiny: Any, run: Path) -> None:
        empty = {
            name: np.zeros_like(tensor) if name.endswith("codes") else tensor
            for name, tensor in tiny.tensors.items()
        }
        start = dataclasses.replace(tiny, tensors=empty)
        record = finetune(start, run, mode="qat", train=[], steps=12, weight_lr=0.2)
        assert record is not None
        assert record.mse_after < 0.8 * record.mse_before
        tensors = load_tensors(run, tiny.plan)
        assert all(tensors[name].any() for name in tensors if name.endswith("codes"))
        rows = collect_rows(
            tiny.denoiser, tiny.recipe.sampler, num_samples=6, num_rows=6, seed=1_000_003
        )
        target = predict(tiny.denoiser, rows, 4)
        for each, expected in ((empty, record.mse_before), (tensors, record.mse_after)):
            found = predict(quantize_model(tiny.denoiser, tiny.plan, each), rows, 4)
            assert (found - target).square().mean().item() == pytest.approx(expected, rel=1e-4)

    def test_same_seed_same_bytes(self, tiny: Any, run: Path) -> None:
        first = finetune(tiny, run)
        written = (run / RunFolder.FINETUNED).read_bytes()
        second = finetune(tiny, run)
        assert (run / RunFolder.FINETUNED).read_bytes() == written
        assert first is not None
        assert second is not None
        assert first.curve == second.curve

    def test_stops_early(self, tiny: Any, run: Path) -> None:
        section = {"steps": 30, "check_every": 1, "patience": 3, "branch_lr": 5.0, "warmup": 0.0}
        record = finetune(tiny, run, **section)
        assert record is not None
        assert record.stopped_early
        assert record.steps == record.best_step + 3 < 30
        assert record.mse_after <= record.mse_before

    def test_mode_none_removes_the_overlay(self, tiny: Any, run: Path) -> None:
        finetune(tiny, run)
        (run / RunFolder.FINETUNE_STATE).write_bytes(b"old")
        assert finetune(tiny, run, mode="none") is None
        left = {path.name for path in run.iterdir()}
        assert not left & {RunFolder.FINETUNE, RunFolder.FINETUNED, RunFolder.FINETUNE_STATE}

    @pytest.mark.parametrize("train", [["branch"], []])
    def test_nothing_to_train(
        self, make_tiny_run: Callable[..., Any], run: Path, train: list[Any]
    ) -> None:
        tiny = make_tiny_run("dit", branch=None)
        with pytest.raises(RecipeError, match=r"^finetune\.train: received (branch|nothing), exp"):
            finetune(tiny, run, train=train)
        assert not (run / RunFolder.FINETUNE).exists()

    def test_loss_that_is_not_finite(self, tiny: Any, run: Path) -> None:
        before = {path.name for path in run.iterdir()}
        with pytest.raises(TreeqError, match=r"^finetune: received loss (nan|inf) at step \d+"):
            finetune(tiny, run, scale_lr=1e6, check_every=1, warmup=0.0)
        assert {path.name for path in run.iterdir()} == before

    @pytest.mark.parametrize("family", ["pixart", "sd3", "flux"])
    def test_other_families(self, make_tiny_run: Callable[..., Any], family: str) -> None:
        tiny = make_tiny_run(family, weight_bits=3, activation_bits=3)
        record = finetune(tiny, tiny.run, steps=10, check_every=5, mode="qat")
        assert record is not None
        assert record.mse_after < record.mse_before
        assert load_tensors(tiny.run, tiny.plan).keys() >= tiny.tensors.keys()


class TestResume:
    def interrupt(self, tiny: Any, run: Path, after: float, **section: Any) -> None:
        def stop(fraction: float) -> None:
            if fraction > after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(tiny, run, stop, **section)

    @pytest.mark.parametrize("mode", ["peft", "qat"])
    def test_gives_the_bytes_of_an_undisturbed_run(self, tiny: Any, run: Path, mode: str) -> None:
        undisturbed = finetune(tiny, run, mode=mode)
        written = (run / RunFolder.FINETUNED).read_bytes()
        for after in (0.45, 0.8):  # after step 3, with the state of step 2; then of step 4
            self.interrupt(tiny, run, after, mode=mode)
            assert (run / RunFolder.FINETUNE_STATE).exists()
        seen: list[float] = []
        resumed = finetune(tiny, run, seen.append, mode=mode)
        assert min(seen) > 0.6  # neither the pool nor the first steps again
        assert (run / RunFolder.FINETUNED).read_bytes() == written
        assert undisturbed is not None
        assert resumed is not None
        assert resumed.curve == undisturbed.curve
        assert resumed.best_step == undisturbed.best_step

    def test_state_of_another_training_is_ignored(self, tiny: Any, run: Path) -> None:
        finetune(tiny, run, branch_lr=0.01)
        written = (run / RunFolder.FINETUNED).read_bytes()
        self.interrupt(tiny, run, 0.6, branch_lr=0.03)
        finetune(tiny, run, branch_lr=0.01)
        assert (run / RunFolder.FINETUNED).read_bytes() == written

    def test_broken_state_is_ignored(self, tiny: Any, run: Path) -> None:
        finetune(tiny, run)
        written = (run / RunFolder.FINETUNED).read_bytes()
        (run / RunFolder.FINETUNE_STATE).write_bytes(b"broken")
        finetune(tiny, run)
        assert (run / RunFolder.FINETUNED).read_bytes() == written

    def test_state_that_cannot_be_written_keeps_the_one_before(
        self, tiny: Any, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupt(tiny, run, 0.5)
        before = (run / RunFolder.FINETUNE_STATE).read_bytes()

        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("treeq_export.finetune.state.save_file", refuse)
        with pytest.raises(OutputError, match="the disk is full"):
            finetune(tiny, run)
        assert (run / RunFolder.FINETUNE_STATE).read_bytes() == before


class TestOverlay:
    @pytest.fixture
    def finetuned(self, tiny: Any, run: Path) -> Path:
        finetune(tiny, run, steps=2)
        return run

    def load_error(self, run: Path) -> str:
        with pytest.raises(PlanError) as error:
            load_tensors(run, load_plan(run))
        assert str(error.value).endswith(f"Run `treeq-export finetune --run {run}` again.")
        return str(error.value)

    def test_of_other_calibrated_tensors(self, finetuned: Path) -> None:
        record = json.loads((finetuned / RunFolder.FINETUNE).read_text())
        (finetuned / RunFolder.FINETUNE).write_text(
            json.dumps(record | {"base_tensors_sha256": "0"})
        )
        assert "belongs to other calibrated tensors" in self.load_error(finetuned)
        assert load_tensors(finetuned, load_plan(finetuned), finetuned=False)

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_malformed_record(self, finetuned: Path, text: str) -> None:
        (finetuned / RunFolder.FINETUNE).write_text(text)
        assert f"{finetuned / RunFolder.FINETUNE}: " in self.load_error(finetuned)

    def test_another_file(self, finetuned: Path) -> None:
        os.truncate(finetuned / RunFolder.FINETUNED, 20)
        assert f"{finetuned / RunFolder.FINETUNED}: not the file" in self.load_error(finetuned)
        (finetuned / RunFolder.FINETUNED).unlink()
        assert f"{finetuned / RunFolder.FINETUNED}: not the file" in self.load_error(finetuned)

    def test_shapes_of_another_plan(self, finetuned: Path, tiny: Any) -> None:
        from safetensors.numpy import save_file

        name = f"{tiny.plan.layers[0].name}.bias"
        save_file({name: np.zeros(3, np.float32)}, finetuned / RunFolder.FINETUNED)
        record = json.loads((finetuned / RunFolder.FINETUNE).read_text())
        record["tensors_sha256"] = sha256_of_file(finetuned / RunFolder.FINETUNED)
        (finetuned / RunFolder.FINETUNE).write_text(json.dumps(record))
        with pytest.raises(PlanError, match=r"bias: received \(3,\), .* Finetune again\."):
            load_tensors(finetuned, tiny.plan)

    def test_images_belong_to_it(self, finetuned: Path) -> None:
        digest = digest_quantized(finetuned, "torch")
        (finetuned / RunFolder.FINETUNE).rename(finetuned / "away.json")
        assert digest_quantized(finetuned, "torch") != digest
        (finetuned / "away.json").rename(finetuned / RunFolder.FINETUNE)
        (finetuned / RunFolder.FINETUNED).unlink()
        with pytest.raises(PlanError, match="treeq-export finetune"):
            digest_quantized(finetuned, "torch")


def test_record_keeps_finite_numbers(tiny: Any, run: Path) -> None:
    record = finetune(tiny, run, steps=2)
    assert record is not None
    numbers = [v for p in record.curve for v in (p.held_out_loss, p.held_out_mse)]
    assert all(math.isfinite(number) for number in numbers)
