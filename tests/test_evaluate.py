"""Evaluate: Frechet distance, scores, cached samples, grids, gates."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.linalg import sqrtm

from treeq_export.errors import PlanError, RecipeError, TreeqError
from treeq_export.evaluate import run_evaluate
from treeq_export.evaluate.frechet import Gaussian, fit_gaussian, frechet_distance
from treeq_export.evaluate.grids import choose_mapping, draw_grid, unpack_samples, write_grid
from treeq_export.evaluate.network import collect_held_out
from treeq_export.evaluate.samples import (
    check_finite,
    digest_denoiser,
    digest_quantized,
    digest_tensors,
    make_fingerprint,
    sample_or_load,
)
from treeq_export.evaluate.scores import Judge, open_judge, score
from treeq_export.evaluate.stage import Baseline, apply_gates, mean_scores
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.conditioning import make_denoiser
from treeq_export.model.trajectories import collect_rows
from treeq_export.model.zoo import Denoiser
from treeq_export.recipe import (
    EvaluateSection,
    ModelSection,
    QualityGates,
    Recipe,
    SamplerSection,
)
from treeq_export.records import QualityRecord, QualityScores, load_record
from treeq_export.runners.protocols import Runner
from treeq_export.runners.torch_runner import TorchRunner

PIXELS = (1, 4, 4)
LATENT = (4, 8, 8)
NUM_FEATURES = 6
NUM_CLASSES = 10
MakeDenoiser = Callable[..., Denoiser]


def write_classifier(
    path: Path,
    sample_shape: Sequence[int] = PIXELS,
    *,
    batch: str | int = "n",
    names: tuple[str, str, str] = ("images", "logits", "features"),
    flat_features: bool = True,
) -> Path:
    """Write a linear classifier; logit c is the value of flattened pixel c."""
    size = math.prod(sample_shape)
    rng = np.random.default_rng(0)
    weights: dict[str, NDArray[Any]] = {
        "head": np.eye(size, NUM_CLASSES, dtype=np.float32),
        "project": rng.standard_normal((size, NUM_FEATURES)).astype(np.float32),
    }
    images, logits, features = names
    nodes = [
        helper.make_node("Flatten", [images], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], [logits]),
        helper.make_node("MatMul", ["flat", "project"], [features if flat_features else "f"]),
    ]
    if not flat_features:
        weights["axis"] = np.array([1])
        nodes.append(helper.make_node("Unsqueeze", ["f", "axis"], [features]))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(images, TensorProto.FLOAT, [batch, *sample_shape])],
        [
            helper.make_tensor_value_info(logits, TensorProto.FLOAT, [batch, NUM_CLASSES]),
            helper.make_tensor_value_info(features, TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def write_reference(path: Path, **tensors: NDArray[Any]) -> Path:
    save_file({"mean": np.zeros(NUM_FEATURES), "covariance": np.eye(NUM_FEATURES)} | tensors, path)
    return path


def make_section(folder: Path, sample_shape: Sequence[int] = PIXELS) -> EvaluateSection:
    return EvaluateSection(
        classifier=str(write_classifier(folder / "classifier.onnx", sample_shape)),
        reference=str(write_reference(folder / "reference.safetensors")),
    )


class TestFrechetDistance:
    def test_closed_form_of_diagonal_gaussians(self) -> None:
        first = Gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
        second = Gaussian(np.array([0.0, 2.0, 5.0]), np.diag([16.0, 0.25, 0.0]))
        shift, spread = 1 + 0 + 4, (1 - 4) ** 2 + (2 - 0.5) ** 2 + 3**2
        assert frechet_distance(first, second) == pytest.approx(shift + spread, rel=1e-12)

    @given(seed=st.integers(0, 1000), num=st.integers(2, 30))
    def test_zero_to_itself_and_symmetric(self, seed: int, num: int) -> None:
        rng = np.random.default_rng(seed)
        first = fit_gaussian(rng.standard_normal((num, 12)))
        second = fit_gaussian(1 + 2 * rng.standard_normal((30, 12)))
        assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-5)
        there, back = frechet_distance(first, second), frechet_distance(second, first)
        assert there == pytest.approx(back, rel=1e-6)
        assert there > 0

    def test_agrees_with_the_matrix_square_root(self) -> None:
        rng = np.random.default_rng(1)
        first = fit_gaussian(rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8)))
        second = fit_gaussian(rng.standard_normal((200, 8)) + 0.5)
        root = sqrtm(first.covariance @ second.covariance)
        expected = (
            np.sum((first.mean - second.mean) ** 2)
            + np.trace(first.covariance + second.covariance)
            - 2 * np.trace(root).real
        )
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)

    def test_constant_features(self) -> None:
        constant = fit_gaussian(np.full((5, 3), 2.0, dtype=np.float32))
        assert frechet_distance(constant, constant) == 0.0
        unit = Gaussian(np.full(3, 2.0), np.eye(3))
        assert frechet_distance(constant, unit) == pytest.approx(3.0)

    def test_fit_is_unbiased(self) -> None:
        gaussian = fit_gaussian([[0.0, 1.0], [2.0, 3.0]])
        assert gaussian.mean.tolist() == [1.0, 2.0]
        assert gaussian.covariance.tolist() == [[2.0, 2.0], [2.0, 2.0]]


class TestOpenJudge:
    def test_nothing_to_judge_with(self) -> None:
        assert open_judge(EvaluateSection(), PIXELS) == Judge()

    def test_both(self, tmp_path: Path) -> None:
        judge = open_judge(make_section(tmp_path), PIXELS)
        assert judge.session is not None
        assert judge.reference is not None
        assert judge.reference.covariance.dtype == np.float64

    def check(self, section: EvaluateSection, message: str) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            open_judge(section, PIXELS)
        assert "\n" not in str(caught.value)

    def test_reference_alone(self, tmp_path: Path) -> None:
        reference = str(write_reference(tmp_path / "reference.safetensors"))
        self.check(EvaluateSection(reference=reference), r"evaluate\.classifier")

    def test_missing_classifier(self, tmp_path: Path) -> None:
        section = EvaluateSection(classifier=str(tmp_path / "absent.onnx"))
        self.check(section, r"absent\.onnx: missing")

    def test_malformed_classifier(self, tmp_path: Path) -> None:
        path = tmp_path / "classifier.onnx"
        path.write_bytes(b"\x08\x07 no model")
        self.check(EvaluateSection(classifier=str(path)), r"classifier\.onnx: is no ONNX model")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"names": ("pixels", "logits", "features")}, "received pixels -> logits, features"),
            ({"names": ("images", "logits", "pooled")}, "received images -> logits, pooled"),
            ({"sample_shape": (3, 4, 4)}, r"cannot take images of shape \(n, 1, 4, 4\)"),
            ({"sample_shape": (4, 4)}, r"cannot take images of shape \(n, 1, 4, 4\)"),
            ({"batch": 1}, r"float32, for any n .*Use a classifier of this model's samples"),
            ({"flat_features": False}, r"features: received shape \(2, 1, 6\), expected \(n, d\)"),
        ],
    )
    def test_classifier_that_does_not_fit(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        path = write_classifier(tmp_path / "classifier.onnx", **changes)
        self.check(EvaluateSection(classifier=str(path)), message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"mean": np.zeros(5)}, r"received mean \(5,\) and covariance \(6, 6\), expected \(6,"),
            ({"covariance": np.eye(5)}, r"covariance \(5, 5\), expected"),
            ({"mean": np.full(NUM_FEATURES, np.nan)}, "NaN"),
            ({"covariance": np.full((NUM_FEATURES, NUM_FEATURES), np.inf)}, "infinity"),
        ],
    )
    def test_reference_that_does_not_fit(
        self, tmp_path: Path, tensors: dict[str, NDArray[Any]], message: str
    ) -> None:
        section = make_section(tmp_path)
        write_reference(tmp_path / "reference.safetensors", **tensors)
        self.check(section, message)

    def test_reference_with_other_names(self, tmp_path: Path) -> None:
        section = make_section(tmp_path)
        save_file({"mu": np.zeros(NUM_FEATURES)}, tmp_path / "reference.safetensors")
        self.check(section, "received tensors mu, expected mean, covariance")

    @pytest.mark.parametrize("content", [None, b"", b"garbage, no safetensors at all"])
    def test_unreadable_reference(self, tmp_path: Path, content: bytes | None) -> None:
        section = make_section(tmp_path)
        path = tmp_path / "reference.safetensors"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        self.check(section, r"reference\.safetensors: .+ Correct evaluate\.reference")


class TestScore:
    def make_images(self, labels: Sequence[int]) -> NDArray[np.float32]:
        """Return images that the classifier takes for the given labels."""
        flat = np.full((len(labels), 16), -1.0, dtype=np.float32)
        flat[np.arange(len(labels)), list(labels)] = 1.0
        return flat.reshape(-1, *PIXELS)

    def test_accuracy_counts_the_conditioned_class(self, tmp_path: Path) -> None:
        judge = open_judge(make_section(tmp_path), PIXELS)
        scores = score(judge, self.make_images([0, 1, 2, 3]), np.array([0, 1, 2, 9]))
        assert scores.class_accuracy == 0.75
        assert scores.psnr_db is None

    def test_no_labels_no_accuracy(self, tmp_path: Path) -> None:
        judge = open_judge(make_section(tmp_path), PIXELS)
        scores = score(judge, self.make_images([0, 1]), None)
        assert scores.class_accuracy is None
        assert scores.frechet_distance is not None

    def test_frechet_distance_is_that_of_the_features(self, tmp_path: Path) -> None:
        judge = open_judge(make_section(tmp_path), PIXELS)
        rng = np.random.default_rng(0)
        # More images than one batch of the classifier holds.
        images = rng.uniform(-1, 1, (300, *PIXELS)).astype(np.float32)
        graph = onnx.load(tmp_path / "classifier.onnx").graph
        project = next(init for init in graph.initializer if init.name == "project")
        features = images.reshape(300, -1) @ numpy_helper.to_array(project)
        unit = Gaussian(np.zeros(NUM_FEATURES), np.eye(NUM_FEATURES))
        expected = frechet_distance(fit_gaussian(features), unit)
        assert score(judge, images, None).frechet_distance == pytest.approx(expected, rel=1e-4)

    def test_too_few_classes(self, tmp_path: Path) -> None:
        judge = open_judge(make_section(tmp_path), PIXELS)
        with pytest.raises(RecipeError, match=r"logits of 10 classes.*largest label 10"):
            score(judge, self.make_images([0, 1]), np.array([0, 10]))

    def test_psnr_is_that_of_the_whole_set(self) -> None:
        full = np.zeros((2, *PIXELS), dtype=np.float32)
        quantized = full.copy()
        quantized[0] = 0.2  # the other image is equal: alone its PSNR would be infinite
        psnr = score(Judge(), quantized, None, full).psnr_db
        assert psnr == pytest.approx(20 * math.log10(2 / math.sqrt(0.04 / 2)))

    def test_pixels_are_clipped_as_a_viewer_does(self) -> None:
        full = np.ones((2, *PIXELS), dtype=np.float32)
        assert score(Judge(), full + 3, None, full + 1).psnr_db == math.inf

    def test_latents_are_measured_by_their_own_extent(self) -> None:
        full = np.linspace(-5, 5, 2 * math.prod(LATENT), dtype=np.float32).reshape(2, *LATENT)
        assert score(Judge(), full + 0.1, None, full).psnr_db == pytest.approx(40.0, abs=1e-3)


class TestSamples:
    def test_the_same_fingerprint_is_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "samples" / "fp_seed0.safetensors"
        made = [torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)]
        supply = iter(made)
        first = sample_or_load(path, "a", lambda: next(supply))
        assert sample_or_load(path, "a", lambda: next(supply)).tolist() == first.tolist()
        assert sample_or_load(path, "b", lambda: next(supply)).tolist() == made[1].tolist()
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
    def test_a_damaged_file_is_made_again(self, tmp_path: Path, damage: bytes | None) -> None:
        path = tmp_path / "fp_seed0.safetensors"
        sample_or_load(path, "a", lambda: torch.zeros(2, 3))
        path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
        assert sample_or_load(path, "a", lambda: torch.ones(2, 3)).sum() == 6

    def test_a_killed_sampling_leaves_nothing(self, tmp_path: Path) -> None:
        def fail() -> torch.Tensor:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample_or_load(tmp_path / "fp_seed0.safetensors", "a", fail)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_images_that_are_not_finite_are_counted(self, bad: float) -> None:
        samples = np.zeros((5, 2, 2), dtype=np.float32)
        samples[1], samples[3, 0, 1] = bad, -bad
        with pytest.raises(TreeqError, match=r"^ort, seed 0: 2 of 5 images .*Do this\.$"):
            check_finite(samples, "ort, seed 0", "Do this.")

    def test_digest_depends_on_names_shapes_and_values(self) -> None:
        base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
        variants = [
            {"b": base["b"], "a": base["a"]},
            {"a": base["a"].reshape(2, 3), "b": base["b"]},
            {"c": base["a"], "b": base["b"]},
            {"a": base["a"] + 1, "b": base["b"]},
            {"a": base["a"].double(), "b": base["b"]},
        ]
        digests = [digest_tensors(variant) for variant in variants]
        assert digests[0] == digest_tensors(base)
        assert len(set(digests)) == len(variants)

    def test_digest_of_a_denoiser(self, make_tiny_denoiser: MakeDenoiser) -> None:
        denoiser = make_tiny_denoiser("dit")
        before = digest_denoiser(denoiser)
        assert before == digest_denoiser(make_tiny_denoiser("dit"))
        next(denoiser.parameters()).data.flatten()[0] += 1
        assert digest_denoiser(denoiser) != before

    def test_digest_of_a_target_covers_external_data(self, tmp_path: Path) -> None:
        folder = tmp_path / "onnx" / "ort"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "model.onnx.data").write_bytes(b"weights")
        before = digest_quantized(tmp_path, "ort")
        (folder / "model.onnx.data").write_bytes(b"others!")
        assert digest_quantized(tmp_path, "ort") != before

    @pytest.mark.parametrize(
        ("runner", "stage"), [("torch", "calibrate"), ("portable", "compile"), ("ort", "compile")]
    )
    def test_missing_files_name_their_stage(self, tmp_path: Path, runner: str, stage: str) -> None:
        with pytest.raises(PlanError, match=f"treeq-export {stage} --run"):
            digest_quantized(tmp_path, runner)

    def test_fingerprint_ignores_the_order_of_its_parts(self) -> None:
        assert make_fingerprint(a=1, b=2) == make_fingerprint(b=2, a=1) != make_fingerprint(a=1)


class TestGrids:
    def test_ten_columns_of_enlarged_images(self) -> None:
        images = np.stack([np.full((1, 8, 8), -1 + index / 6, np.float32) for index in range(13)])
        grid = draw_grid(images, choose_mapping(images))
        assert grid.shape == (2 * 48 + 2, 10 * 48 + 9 * 2, 3)
        assert grid[0, 0].tolist() == [0, 0, 0]
        assert grid[47, 47].tolist() == [0, 0, 0]
        assert grid[0, 48].tolist() == [255, 255, 255]
        assert grid[50, 100].tolist() == [255, 255, 255]  # image 12 in the second row
        assert grid[10, 6 * 50].tolist() == [128, 128, 128]

    def test_at_most_ten_rows_and_large_images_as_they_are(self) -> None:
        images = np.zeros((120, 3, 64, 50), dtype=np.float32)
        assert draw_grid(images, choose_mapping(images)).shape == (658, 518, 3)

    def test_pixels_outside_are_clipped(self) -> None:
        images = np.array([-7.0, 7.0], dtype=np.float32).reshape(2, 1, 1, 1)
        grid = draw_grid(images, choose_mapping(images))
        assert (grid[0, 0, 0], grid[0, -1, 0]) == (0, 255)

    def test_latents_share_the_mapping_of_full_precision(self) -> None:
        rng = np.random.default_rng(0)
        full = rng.standard_normal((4, *LATENT)).astype(np.float32)
        mapping = choose_mapping(full)
        assert mapping.description.startswith("latent channels 0..2")
        grid, doubled = draw_grid(full, mapping), draw_grid(2 * full, mapping)
        for channel in range(3):
            assert (grid[..., channel].min(), grid[..., channel].max()) == (0, 255)
        # The same value is the same pixel in both.
        assert (grid[:48, :48][::6, ::6] != doubled[:48, :48][::6, ::6]).any()
        assert draw_grid(full * np.float32(0.5), mapping).std() < grid.std()

    def test_two_channel_latents_show_one(self) -> None:
        full = np.zeros((1, 2, 8, 8), dtype=np.float32)
        full[:, 0, 0, 0] = 1.0
        mapping = choose_mapping(full)
        assert mapping.description.startswith("latent channels 0..0")
        assert draw_grid(full, mapping)[0, 0].tolist() == [255, 255, 255]

    def test_flux_patches_are_unfolded(self) -> None:
        latent = np.arange(2 * 4 * 6 * 6, dtype=np.float32).reshape(2, 4, 6, 6)
        packed = np.empty((2, 9, 16), dtype=np.float32)
        for token in range(9):
            row, column = 2 * (token // 3), 2 * (token % 3)
            packed[:, token] = latent[:, :, row : row + 2, column : column + 2].reshape(2, -1)
        assert np.array_equal(unpack_samples(packed), latent)
        assert choose_mapping(packed).low.shape == (3, 1, 1)

    def test_file_says_what_it_shows(self, tmp_path: Path) -> None:
        images = np.zeros((3, *LATENT), dtype=np.float32)
        path = tmp_path / "samples" / "fp.png"
        mapping = choose_mapping(images)
        write_grid(path, images, mapping)
        with Image.open(path) as image:
            assert image.size == (148, 48)
            assert image.info["Description"] == mapping.description


HELD_OUT_CALLS = 1  # a tenth of 6 images' 2 steps


class CountingRunner:
    """A runner that adds a constant to the network's output and counts its calls."""

    def __init__(self, denoiser: Denoiser, offset: float = 0.0) -> None:
        self.denoiser = denoiser
        self.offset = offset
        self.num_calls = 0

    def run(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        self.num_calls += 1
        with TorchRunner(self.denoiser) as runner:
            return runner.run(inputs) + np.float32(self.offset)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with files for the runner "torch"; only their bytes matter here."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text("{}")
    (run / "plan.safetensors").write_bytes(b"tensors")
    return run


class TestRunEvaluate:
    def make_recipe(self, folder: Path, **changes: Any) -> Recipe:
        section = make_section(folder, LATENT)
        fields = {"num_samples": 6, "seeds": [0, 1], "runner": "torch"} | changes
        return Recipe(
            name="tiny",
            model=ModelSection(checkpoint="checkpoint"),
            sampler=SamplerSection(steps=2, guidance_scale=1.5, batch_size=4),
            evaluate=section.model_copy(update=fields),
        )

    def evaluate(
        self, run: Path, denoiser: Denoiser, runner: Runner, recipe: Recipe
    ) -> QualityRecord:
        return run_evaluate(run, denoiser, runner, recipe, on_step=lambda _: None)

    def test_equal_models_score_equally(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        gates = QualityGates(max_frechet_ratio=1.0, min_psnr_db=99.0, min_class_accuracy=1.0)
        recipe = self.make_recipe(tmp_path, gates=gates)
        steps: list[float] = []
        record = run_evaluate(
            run_folder, denoiser, CountingRunner(denoiser), recipe, on_step=steps.append
        )
        for seed in record.seeds:
            assert seed.quantized.frechet_distance == seed.fp.frechet_distance
            assert seed.quantized.psnr_db == math.inf
            assert seed.fp.psnr_db is None
        assert [seed.seed for seed in record.seeds] == [0, 1]
        distances = [seed.fp.frechet_distance or 0.0 for seed in record.seeds]
        assert record.fp.frechet_distance == pytest.approx(sum(distances) / 2)
        assert distances[0] != distances[1]
        assert [gate.passed for gate in record.gates] == [True, False, True]
        assert (record.runner, record.conditioning) == ("torch", "labels")
        assert steps == sorted(steps)
        assert steps[-1] == 1.0
        assert load_record(run_folder / "quality.json", QualityRecord, "evaluate") == record
        for name in record.grids.values():
            with Image.open(run_folder / name) as image:
                assert image.info["Description"].startswith("latent channels 0..2")

    def test_damage_shows(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path, gates=QualityGates(min_psnr_db=40.0))
        record = self.evaluate(run_folder, denoiser, CountingRunner(denoiser, 0.5), recipe)
        # A velocity that is off by 0.5 all the way moves every latent by 0.5.
        fp = load_file(run_folder / "samples/fp_seed0.safetensors")["samples"]
        quantized = load_file(run_folder / "samples/quantized_seed0.safetensors")["samples"]
        assert fp.shape == (6, *LATENT)
        assert np.abs(quantized - fp).max() > 0.3
        assert record.quantized.psnr_db is not None
        assert record.quantized.psnr_db < 40.0
        assert [gate.passed for gate in record.gates] == [False]

    def test_goes_on_where_it_was_interrupted(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path)
        runner = CountingRunner(denoiser)
        per_seed = 2 * 2
        first = self.evaluate(run_folder, denoiser, runner, recipe)
        assert runner.num_calls == 2 * per_seed + HELD_OUT_CALLS
        assert self.evaluate(run_folder, denoiser, runner, recipe) == first
        assert runner.num_calls == 2 * per_seed + 2 * HELD_OUT_CALLS
        (run_folder / "samples/quantized_seed1.safetensors").unlink()
        assert self.evaluate(run_folder, denoiser, runner, recipe) == first
        assert runner.num_calls == 3 * per_seed + 3 * HELD_OUT_CALLS

    @pytest.mark.parametrize("change", ["plan", "sampler", "num", "weights"])
    def test_whatever_changes_the_images_is_sampled_again(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser, change: str
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path, seeds=[0])
        runner = CountingRunner(denoiser)
        self.evaluate(run_folder, denoiser, runner, recipe)
        fp_file = run_folder / "samples/fp_seed0.safetensors"
        before, calls = fp_file.read_bytes(), runner.num_calls
        if change == "plan":
            (run_folder / "plan.safetensors").write_bytes(b"changed")
        elif change == "sampler":
            sampler = recipe.sampler.model_copy(update={"guidance_scale": 2.0})
            recipe = recipe.model_copy(update={"sampler": sampler})
        elif change == "num":
            recipe = self.make_recipe(tmp_path, seeds=[0], num_samples=7)
        else:
            next(denoiser.parameters()).data += 0.1
        self.evaluate(run_folder, denoiser, runner, recipe)
        assert (fp_file.read_bytes() == before) == (change == "plan")
        assert (runner.num_calls > calls + HELD_OUT_CALLS) == (change != "weights")

    @pytest.mark.parametrize("broken", ["quantized", "full precision"])
    def test_images_that_are_not_finite(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser, broken: str
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path)
        runner = CountingRunner(denoiser, math.nan)
        name = "torch"
        if broken == "full precision":
            next(denoiser.parameters()).data.fill_(math.inf)
            name = r"torch \(full precision\)"
        with pytest.raises(TreeqError, match=f"^{name}, seed 0: 6 of 6 images hold NaN") as caught:
            self.evaluate(run_folder, denoiser, runner, recipe)
        assert "\n" not in str(caught.value)
        assert not (run_folder / "quality.json").exists()

    def test_network_error_of_a_constant_offset(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path, seeds=[0])
        exact = self.evaluate(run_folder, denoiser, CountingRunner(denoiser), recipe)
        assert exact.network_mse == 0.0
        record = self.evaluate(run_folder, denoiser, CountingRunner(denoiser, 0.5), recipe)
        assert record.network_mse == pytest.approx(0.25, rel=1e-4)

    def test_held_out_inputs_are_not_those_of_calibration(
        self, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path)
        held_out = collect_held_out(denoiser, recipe)
        assert len(held_out.expected) == 1
        more = self.make_recipe(tmp_path, num_samples=600)
        assert len(collect_held_out(denoiser, more).expected) == 120
        calibration = collect_rows(
            denoiser, recipe.sampler, num_samples=6, num_rows=None, seed=recipe.seed
        )
        assert not torch.equal(held_out.rows["sample"], calibration["sample"])
        other = recipe.model_copy(update={"seed": 1})
        rows = collect_held_out(denoiser, other).rows
        assert not torch.equal(held_out.rows["sample"], rows["sample"])

    def test_baseline_is_scored_beside_ours(
        self, run_folder: Path, tmp_path: Path, make_tiny_run: Callable[..., Any]
    ) -> None:
        tiny = make_tiny_run("dit")
        recipe = self.make_recipe(tmp_path)
        runner = CountingRunner(tiny.denoiser, 0.5)
        baseline = Baseline(tiny.plan, runner, "digest of the baseline")
        steps: list[float] = []
        record = run_evaluate(
            run_folder,
            tiny.denoiser,
            CountingRunner(tiny.denoiser),
            recipe,
            on_step=steps.append,
            baseline=baseline,
        )
        assert record.baseline is not None
        assert record.baseline.strategy == "uniform"
        assert (record.baseline.weight_bits, record.baseline.activation_bits) == (4.0, 4.0)
        assert record.baseline.network_mse == pytest.approx(0.25, rel=1e-4)
        distances = [s.baseline.frechet_distance or 0.0 for s in record.seeds if s.baseline]
        assert record.baseline.scores.frechet_distance == pytest.approx(np.mean(distances))
        assert record.baseline.scores.psnr_db != record.quantized.psnr_db == math.inf
        assert list(record.grids) == ["fp", "quantized", "baseline"]
        assert (run_folder / record.grids["baseline"]).is_file()
        assert steps == sorted(steps)
        calls = runner.num_calls
        run_evaluate(
            run_folder,
            tiny.denoiser,
            CountingRunner(tiny.denoiser),
            recipe,
            on_step=lambda _: None,
            baseline=baseline,
        )
        assert runner.num_calls == calls + HELD_OUT_CALLS

    def test_runs_may_share_full_precision(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path, seeds=[0])
        shared = tmp_path / "shared"
        for source in ("first", "second"):
            run_evaluate(
                tmp_path / source,
                denoiser,
                CountingRunner(denoiser),
                recipe,
                on_step=lambda _: None,
                fp_samples=shared,
                source=source,
            )
            files = {path.name for path in (tmp_path / source / "samples").iterdir()}
            assert files == {"fp.png", "quantized.png", "quantized_seed0.safetensors"}
        assert [path.name for path in shared.iterdir()] == ["fp_seed0.safetensors"]

    def test_text_models_have_no_class_accuracy(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("sd3")
        recipe = self.make_recipe(tmp_path, seeds=[0])
        record = self.evaluate(run_folder, denoiser, CountingRunner(denoiser), recipe)
        assert record.conditioning == "random"
        assert record.fp.class_accuracy is None
        assert record.fp.frechet_distance is not None
        gated = self.make_recipe(tmp_path, gates=QualityGates(min_class_accuracy=0.5))
        with pytest.raises(RecipeError, match="not conditioned on class labels"):
            self.evaluate(run_folder, denoiser, CountingRunner(denoiser), gated)

    @pytest.mark.parametrize("gate", ["max_frechet_ratio", "min_class_accuracy"])
    def test_gate_without_its_files_is_refused_before_sampling(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser, gate: str
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(
            tmp_path, classifier=None, reference=None, gates=QualityGates(**{gate: 0.5})
        )
        runner = CountingRunner(denoiser)
        with pytest.raises(RecipeError, match=rf"evaluate\.gates\.{gate}: needs"):
            self.evaluate(run_folder, denoiser, runner, recipe)
        assert runner.num_calls == 0

    def test_psnr_alone_needs_no_files(
        self, run_folder: Path, tmp_path: Path, make_tiny_denoiser: MakeDenoiser
    ) -> None:
        denoiser = make_tiny_denoiser("dit")
        recipe = self.make_recipe(tmp_path, classifier=None, reference=None, seeds=[0])
        record = self.evaluate(run_folder, denoiser, CountingRunner(denoiser, 0.1), recipe)
        assert record.quantized.frechet_distance is None
        assert record.quantized.psnr_db is not None
        assert 0 < record.quantized.psnr_db < 100


class TestGates:
    @pytest.mark.parametrize(
        ("quantized", "fp", "measured", "passed"),
        [
            (1.2, 1.0, 1.2, True),
            (1.6, 1.0, 1.6, False),
            (0.0, 0.0, 1.0, True),
            (1.0, 0.0, math.inf, False),
        ],
    )
    def test_frechet_ratio(
        self, quantized: float, fp: float, measured: float, passed: bool
    ) -> None:
        [gate] = apply_gates(
            QualityGates(max_frechet_ratio=1.5),
            QualityScores(frechet_distance=fp, class_accuracy=None),
            QualityScores(frechet_distance=quantized, class_accuracy=None),
        )
        assert (gate.measured, gate.passed, gate.at_least) == (measured, passed, False)

    def test_what_was_not_measured_passes_no_gate(self) -> None:
        nothing = QualityScores(frechet_distance=None, class_accuracy=None)
        gates = QualityGates(max_frechet_ratio=9.0, min_class_accuracy=0.0, min_psnr_db=0.0)
        assert [gate.passed for gate in apply_gates(gates, nothing, nothing)] == [False] * 3

    def test_mean_over_seeds(self) -> None:
        scores = [
            QualityScores(frechet_distance=1.0, class_accuracy=0.5, psnr_db=math.inf),
            QualityScores(frechet_distance=2.0, class_accuracy=None, psnr_db=20.0),
        ]
        mean = mean_scores(scores)
        assert mean == QualityScores(frechet_distance=1.5, class_accuracy=None, psnr_db=math.inf)


def test_digits_sample_is_recognised(
    tmp_path: Path, digits_folder: Path, digits_checkpoint: Path
) -> None:
    """The shipped checkpoint draws digits that the shipped classifier recognises."""
    checkpoint = open_checkpoint(digits_checkpoint)
    section = ModelSection(checkpoint=str(digits_checkpoint))
    denoiser = make_denoiser(load_model(checkpoint), checkpoint, section)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "plan.safetensors").write_bytes(b"")
    recipe = Recipe(
        name="digits",
        model=section,
        sampler=SamplerSection(steps=8, guidance_scale=2.0),
        evaluate=EvaluateSection(
            num_samples=50,
            classifier=str(digits_folder / "classifier.onnx"),
            reference=str(digits_folder / "reference.safetensors"),
            runner="torch",
        ),
    )
    with TorchRunner(denoiser) as runner:
        record = run_evaluate(tmp_path, denoiser, runner, recipe, on_step=lambda _: None)
    assert record.fp.class_accuracy is not None
    assert record.fp.class_accuracy >= 0.9
    assert record.quantized.frechet_distance == record.fp.frechet_distance
