import base64
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from treeq_export.plan import Plan, load_plan, save_plan
from treeq_export.recipe import Recipe, load_recipe
from treeq_export.records import (
    BenchRecord,
    CompileRecord,
    FinetuneRecord,
    GateResult,
    ParityRecord,
    QualityRecord,
    SearchRecord,
    save_record,
)
from treeq_export.report import make_report, write_report
from treeq_export.report.html import dump_recipe

Page = Callable[[], str]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """Collects tags, ids, links and text, and checks that tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def test_page_is_well_formed_with_unique_ids_and_working_links(full_page: Page) -> None:
    outline = Outline(full_page())
    ids = outline.values("id")
    assert len(ids) == len(set(ids))
    links = outline.values("href")
    assert "#parity" in links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(link.startswith("#") for link in links)


def test_page_loads_nothing(full_page: Page) -> None:
    text = full_page()
    outline = Outline(text)
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert {source[:22] for source in outline.values("src")} == {"data:image/png;base64,"}
    assert {tag for tag, _ in outline.tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in outline.values(
        "content"
    )


def test_page_depends_on_its_inputs_only(run: Path, full_page: Page) -> None:
    first = full_page()
    (run / "report.html").unlink()
    assert full_page() == first


def test_page_is_the_same_wherever_the_run_lies(
    run: Path, full_page: Page, recipe: Recipe, tmp_path: Path
) -> None:
    text = full_page()
    moved = tmp_path / "elsewhere" / "deeper" / "runs" / "tiny"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    checkpoint = str(tmp_path / "elsewhere" / "deeper" / "checkpoint")
    model = recipe.model.model_copy(update={"checkpoint": checkpoint})
    write_report(
        make_report(
            moved,
            stages={"search": 0.5, "calibrate": 130.0},
            recipe=recipe.model_copy(update={"model": model}),
            commands=["treeq-export run recipe.yaml --out runs/tiny"],
        )
    )
    assert (moved / "report.html").read_text() == text
    assert str(tmp_path) not in text


def test_page_shows_verdict_and_key_figures(page: Page) -> None:
    text = Outline(page()).text
    assert "✓ All 5 gates passed" in text
    assert "Average bits W 5.00 · A 13.67 over 3 layers" in text
    assert "Smaller than float32, portable 2.10x portable: 2 kB (2.10x) ort: 800 B (5.25x)" in text
    assert "Speed against float32, portable 1.50x portable: 1.50x [1.38, 1.62]" in text
    assert "ort: 0.80x [0.68, 0.93] slower against ort_fp32, batch 2" in text
    assert "Fréchet distance 3.25 → 3.75" in text
    assert "Class accuracy 98.5 % → 97.0 %" in text
    assert "PSNR to full precision, equal seeds: 24.5 dB" in text
    assert "Parity, end to end, portable 51.2 dB" in text


def test_page_shows_every_section_s_numbers(page: Page) -> None:
    text = Outline(page()).text
    assert "portable end-to-end sqnr_db 51.25 ≥ 40 ✓ passed" in text
    assert "quality frechet ratio 1.154 ≤ 1.5 ✓ passed" in text
    assert "blocks.0.ff.up 4/5 96.5 2e-06 55.5 17.2 99.95 % ✓ equal" in text
    assert "blocks.1.ff.up 8/fp 111.5 2e-06 55.5 17.2 - -" in text
    assert "portable ort_fp32 8 1.50x 1.38 to 1.62 faster" in text
    assert "portable 2 kB 52 MB 71 MB 0.25 s" in text
    assert "MatMulIntegerToFloat" in text
    assert "all 3 layers as planned" in text
    assert "weight only" in text
    assert "cpu.model Test CPU" in text
    assert "recipe 0; parity 3; images 7" in text
    assert "Stage calibrate 2 min 10 s" in text
    assert "treeq-export run recipe.yaml --out runs/tiny" in text
    assert "5f" * 32 in text


def test_page_names_failed_gates_with_their_numbers(
    run: Path, page: Page, make_parity: Callable[..., ParityRecord]
) -> None:
    save_record(run / "parity.json", make_parity(39.99999))
    text = Outline(page()).text
    assert "✗ 1 of 5 gates failed ort least layer sqnr_db: 39.99999, required ≥ 40" in text


def test_page_names_a_target_that_failed_without_a_gate(
    run: Path, page: Page, make_parity: Callable[..., ParityRecord]
) -> None:
    record = make_parity()
    broken = record.targets[0].model_copy(update={"passed": False})
    save_record(run / "parity.json", record.model_copy(update={"targets": [broken]}))
    assert "1 of 3 gates failed portable parity" in Outline(page()).text


@pytest.mark.parametrize(
    ("section", "stage"), [("parity", "validate"), ("bench", "bench"), ("quality", "evaluate")]
)
def test_page_says_how_to_measure_what_is_missing(
    run: Path, page: Page, section: str, stage: str
) -> None:
    (run / f"{section}.json").unlink()
    text = Outline(page()).text
    assert f"Not measured: run treeq-export {stage} --run DIR" in text
    assert f"○ Incomplete: {section} not measured" in text


def test_page_of_a_run_without_any_measurement(
    run: Path, full_page: Page, compiled: CompileRecord
) -> None:
    for section in ("parity", "bench", "quality"):
        (run / f"{section}.json").unlink()
    save_record(run / "compile.json", compiled.model_copy(update={"targets": []}))
    text = Outline(full_page()).text
    assert "Incomplete: parity, quality, bench not measured" in text
    assert "Smaller than float32 not measured no target compiled" in text
    assert "No gate was measured." in text
    assert "No quantized target was compiled." in text


def test_page_of_records_without_entries(
    run: Path, full_page: Page, make_parity: Callable[..., ParityRecord], bench: BenchRecord
) -> None:
    empty = make_parity().model_copy(update={"targets": []})
    save_record(run / "parity.json", empty)
    nothing = {"rows": [], "memory": [], "speedups": [], "environment": {}}
    save_record(run / "bench.json", bench.model_copy(update=nothing))
    text = Outline(full_page()).text
    assert "Parity, end to end not measured" in text
    assert "No baseline was timed, so there is no ratio." in text


def test_page_escapes_what_comes_from_the_run(
    run: Path,
    full_page: Page,
    plan: Plan,
    make_parity: Callable[..., ParityRecord],
    bench: BenchRecord,
) -> None:
    hostile = '<script>alert("x")</script>'
    tree = plan.layers[0].tree.model_copy(update={"position": hostile})
    layer = plan.layers[0].model_copy(update={"name": hostile, "tree": tree})
    save_plan(run, plan.model_copy(update={"layers": (layer, *plan.layers[1:])}))
    record = make_parity()
    target = record.targets[0]
    broken = target.model_copy(
        update={
            "target": hostile,
            "layers": [target.layers[0].model_copy(update={"name": hostile})],
            "gates": [GateResult.of(hostile, 1.0, 2.0, at_least=True)],
        }
    )
    save_record(run / "parity.json", record.model_copy(update={"targets": [broken]}))
    environment = {hostile: "</pre><img src=x onerror=alert(1)>"}
    save_record(run / "bench.json", bench.model_copy(update={"environment": environment}))
    text = full_page()
    outline = Outline(text)
    assert hostile not in text
    assert "<img src=x" not in text
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.text.count(hostile) >= 6
    assert any(title.startswith(hostile) for title in outline.values("title"))


def test_page_shows_infinity_and_nan_as_words(
    run: Path, full_page: Page, make_parity: Callable[..., ParityRecord]
) -> None:
    save_record(run / "parity.json", make_parity(math.nan))
    text = Outline(full_page()).text
    assert "blocks.0.attn.to_q 3/4 inf 0 " in text
    assert "blocks.0.ff.up (nan dB)" in text
    assert "ort least layer sqnr_db nan ≥ 40 ✗ failed" in text
    assert "inf: bit-exact" in text
    assert "nan, -inf" in text


def test_page_embeds_the_grids_full_precision_first(run: Path, page: Page) -> None:
    (run / "samples" / "fp.png").write_bytes((run / "samples" / "fp.png").read_bytes() + b"fp")
    outline = Outline(page())
    images = [base64.b64decode(source.partition(",")[2]) for source in outline.values("src")]
    assert images == [(run / "samples" / f"{n}.png").read_bytes() for n in ("fp", "quantized")]
    assert outline.values("alt") == ["Samples: Full precision", "Samples: Quantized"]
    assert outline.values("class").count("pixelated") == 2


def test_page_names_grids_that_cannot_be_shown(
    run: Path, page: Page, quality: QualityRecord
) -> None:
    (run / "samples" / "fp.png").unlink()
    (run / "samples" / "quantized.png").write_bytes(b"GIF89a" + bytes(40))
    (run.parent / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    grids = {**quality.grids, "other": "../secret.png"}
    save_record(run / "quality.json", quality.model_copy(update={"grids": grids}))
    outline = Outline(page())
    assert "samples/fp.png: missing" in outline.text
    assert "samples/quantized.png: not a PNG file" in outline.text
    assert "../secret.png: outside the run folder" in outline.text
    assert outline.values("src") == []


def test_page_labels_what_is_emulated_or_not_comparable(
    run: Path, page: Page, quality: QualityRecord
) -> None:
    before = Outline(page()).text
    assert "emulated" not in before
    assert "not comparable" not in before
    changed = quality.model_copy(update={"runner": "torch", "conditioning": "random"})
    save_record(run / "quality.json", changed)
    after = Outline(page()).text
    assert "emulated PyTorch imitates the quantization in floating point" in after
    assert "not comparable The conditioning is random" in after


def test_page_without_a_classifier_says_not_measured(
    run: Path, page: Page, quality: QualityRecord
) -> None:
    blank = {"frechet_distance": None, "class_accuracy": None}
    fp = quality.fp.model_copy(update=blank)
    quantized = quality.quantized.model_copy(update={**blank, "psnr_db": None})
    save_record(run / "quality.json", quality.model_copy(update={"fp": fp, "quantized": quantized}))
    text = Outline(page()).text
    assert "Fréchet distance not measured the recipe names no classifier" in text
    assert "PSNR to full precision: not measured" in text
    assert "quantized not measured not measured not measured" in text


def test_page_lists_every_seed_and_their_mean(
    run: Path, page: Page, quality: QualityRecord
) -> None:
    second = quality.seeds[0].model_copy(update={"seed": 8})
    seeds = [*quality.seeds, second]
    save_record(run / "quality.json", quality.model_copy(update={"seeds": seeds}))
    text = Outline(page()).text
    assert "100 images for each of 2 seeds." in text
    assert "7 full precision 3.250 98.5 % - - quantized 3.750 97.0 % 24.5 dB - 8 full" in text
    assert "mean full precision 3.250" in text


def test_page_says_when_there_is_no_float32_graph(
    run: Path, page: Page, compiled: CompileRecord
) -> None:
    assert "No float32 graph was compiled" not in page()
    save_record(run / "compile.json", CompileRecord(targets=compiled.targets[:-1]))
    assert "ratios are to 4 kB, which is 4 bytes for each parameter" in Outline(page()).text


def test_page_without_a_baseline_gives_no_ratio(run: Path, page: Page, bench: BenchRecord) -> None:
    save_record(run / "bench.json", bench.model_copy(update={"speedups": []}))
    text = Outline(page()).text
    assert "Speed against float32 not measured no baseline was timed" in text
    assert "No baseline was timed, so there is no ratio." in text


def test_page_calls_an_interval_around_one_no_clear_difference(
    run: Path, page: Page, bench: BenchRecord
) -> None:
    even = [s.model_copy(update={"low": 0.9, "ratio": 1.0, "high": 1.1}) for s in bench.speedups]
    save_record(run / "bench.json", bench.model_copy(update={"speedups": even}))
    text = Outline(page()).text
    assert "portable: 1.00x [0.90, 1.10] no clear difference" in text
    assert "portable ort_fp32 2 1.00x 0.90 to 1.10 no clear difference" in text


def test_page_flags_layers_that_are_not_as_planned(
    run: Path, page: Page, compiled: CompileRecord
) -> None:
    ort, portable, full = compiled.targets
    floating = portable.audit[0].model_copy(update={"integer": False, "op_type": "Gemm"})
    broken = portable.model_copy(update={"audit": [floating, portable.audit[1]]})
    save_record(run / "compile.json", CompileRecord(targets=[ort, broken, full]))
    text = Outline(page()).text
    assert "✗ 2 not as planned" in text
    assert "blocks.0.attn.to_q Gemm ✗ floating point MatMulIntegerToFloat" in text
    assert "blocks.1.ff.up ✗ not found MatMul weight only" in text


def test_page_draws_the_heat_map_with_holes(page: Page) -> None:
    text = page()
    table = text[text.index('<table class="heat"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table, re.DOTALL)
    cells = {
        name: [re.findall(r'<b class="b(\w+)">\1</b>', cell) for cell in cells.split("</td>")[:-1]]
        for name, cells in rows
    }
    assert cells == {"attn.to_q": [["3", "4"], []], "ff.up": [["4", "5"], ["8", "fp"]]}
    assert 'class="cell branch" title="blocks.1.ff.up: 8 → 16;' in table


def test_page_of_three_hundred_layers(run: Path, full_page: Page, plan: Plan) -> None:
    layers = tuple(
        plan.layers[1].model_copy(
            update={
                "name": f"blocks.{block}.{position}",
                "tree": plan.layers[1].tree.model_copy(
                    update={"block": block, "position": position}
                ),
            }
        )
        for block in range(30)
        for position in "abcdefghij"
    )
    save_plan(run, plan.model_copy(update={"layers": layers}))
    text = full_page()
    assert text.count('<div class="cell"') == 300
    assert 'class="heat compact"' in text
    assert "300 quantized layers" in Outline(text).text


def test_dumped_recipe_works_from_the_run_folder(run: Path, recipe: Recipe) -> None:
    evaluate = recipe.evaluate.model_copy(update={"classifier": str(run / "classifier.onnx")})
    full = recipe.model_copy(update={"evaluate": evaluate})
    text = dump_recipe(full, run)
    assert "checkpoint: ../../checkpoint" in text
    assert "classifier: classifier.onnx" in text
    (run / "again.yaml").write_text(text)
    assert load_recipe(run / "again.yaml") == full


def test_page_states_the_digest_of_an_uncalibrated_plan(run: Path, page: Page, plan: Plan) -> None:
    save_plan(run, plan)
    assert load_plan(run).tensors_sha256 is None
    assert "plan.safetensors, SHA-256 not calibrated" in Outline(page()).text


def test_page_of_a_searched_run(searched_run: Path, full_page: Page) -> None:
    html = full_page()
    text = Outline(html).text
    for link in ("#search", "#finetune"):
        assert f'<a href="{link}">' in html
    assert "Strategy “tss”, budget weight bits 3, activation bits 3, noise 1." in text
    assert "Evaluations 288 300 (50 from the journal)" in text
    assert "Time 2 min 30 s 2 min 1 s" in text
    assert "chosen 3.00 3.00 0.25 0.26 0.125 2.50 3.00 0.25 0.26 -" in text
    assert "On 1 of 1 layers another grid beats plain low rank (1x1)." in text
    assert "blocks.1.ff.up 2x2 r1 0.02 0.03 0.02" in text
    assert "1,234 numbers trained by distillation" in text
    assert "0.008 → 0.003 (2.67x less), in 75.0 s. 200 steps, stopped early" in text
    assert html.count("<svg") == 6
    grids = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert grids == [
        "Full precision",
        "Uniform bits, W 3.00 A 3.50",
        "Ours, W 5.00 A 13.67",
    ]
    assert "fake-quantized in PyTorch" in text
    assert "uniform bits 9.500 80.0 % 18.5 dB 0.0125 quantized 3.750" in text


def test_page_of_a_search_without_tree_and_cost(
    run: Path, page: Page, search: SearchRecord
) -> None:
    changes = {
        "strategy": "uniform",
        "cost": None,
        "nodes": [],
        "front": [],
        "branches": {},
        "finalists": [],
    }
    bare = search.model_copy(update={**changes, "network_mse": None, "budget": {}})
    save_record(run / "search.json", bare)
    text = Outline(page()).text
    assert "Strategy “uniform”. Cost Announced Measured Time - 2 min 1 s" in text
    assert "Tree" not in text
    assert "Branch shapes" not in text


def test_page_of_a_qat_run_that_left_no_error(
    run: Path, page: Page, finetune: FinetuneRecord
) -> None:
    changes = {"mode": "qat", "mse_after": 0.0, "stopped_early": False, "curve": []}
    save_record(run / "finetune.json", finetune.model_copy(update=changes))
    text = Outline(page()).text
    assert "0.008 → 0, in 75.0 s. 200 steps; the tensors" in text
    assert "frozen" not in text


def test_page_announces_nothing_for_a_search_without_a_tree(
    run: Path, page: Page, search: SearchRecord
) -> None:
    save_record(run / "search.json", search.model_copy(update={"nodes": [], "front": []}))
    text = Outline(page()).text
    assert "Leaves 2 - Evaluations - 300 (50 from the journal) Time - 2 min 1 s" in text
    assert "Merges" not in text


def _section(text: str, name: str) -> str:
    return text[text.index(f'<section id="{name}">') :].split("</section>")[0]


def test_gates_are_grouped_by_target_and_folded_where_they_pass(
    run: Path, page: Page, make_parity: Callable[..., ParityRecord]
) -> None:
    gates = _section(page(), "gates")
    assert re.findall(r"<summary>(\S+) ", gates) == ["portable", "ort", "images"]
    assert "<details open>" not in gates
    save_record(run / "parity.json", make_parity(31.25))
    gates = _section(page(), "gates")
    assert gates.count("<details open>") == 1
    assert gates.count("<details>") == 2
    assert "1 of 2 failed" in gates[gates.index("<details open>") :]


def test_pictures_come_first(page: Page) -> None:
    text = page()
    assert text.index('id="images"') < text.index('id="gates"')
    images = _section(text, "images")
    assert images.index("<img") < images.index("<p>")


def test_a_limit_that_was_computed_has_few_digits(
    run: Path, page: Page, make_parity: Callable[..., ParityRecord]
) -> None:
    record = make_parity()
    gate = GateResult.of("ort: end-to-end sqnr_db", 32.671, 26.84889849857438, at_least=True)
    target = record.targets[1].model_copy(update={"gates": [gate]})
    save_record(run / "parity.json", record.model_copy(update={"targets": [target]}))
    assert '<td class="n">32.67</td><td class="n">≥ 26.85</td>' in page()
