"""Options of compare as they are written on the command line, and the cells they make."""

from pathlib import Path
from typing import Any

import pytest

from treeq_export.compare.cells import comparable_part, make_cells, shared_recipe
from treeq_export.compare.options import (
    PARSERS,
    STRATEGIES,
    CompareOptions,
    command_line,
    parse_budgets,
    parse_names,
    parse_peers,
    parse_seeds,
)
from treeq_export.errors import RecipeError
from treeq_export.peers import PEERS
from treeq_export.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"checkpoint": "/checkpoint"},
            "evaluate": {
                "seeds": [4, 5, 6, 4],
                "runner": "ort",
                "baseline": "uniform",
                "gates": {"min_psnr_db": 20.0},
            },
            "finetune": {"mode": "peft", "steps": 7},
        }
    )


class TestParsing:
    def test_lists(self) -> None:
        assert PARSERS["budgets"]("2.5, 3,3.0,8") == (2.5, 3.0, 8.0)
        assert PARSERS["strategies"]("tss,uniform") == ("tss", "uniform")
        assert PARSERS["variants"]("none,qat") == ("none", "qat")
        assert PARSERS["seeds"]("0,7") == (0, 7)
        assert PARSERS["peers"]("modelopt_awq_w4") == ("modelopt_awq_w4",)

    @pytest.mark.parametrize("text", ["1.9", "8.01", "three", "nan", "inf", "-3", "3,,x"])
    def test_budget_that_no_layer_can_have(self, text: str) -> None:
        with pytest.raises(ValueError, match="expected average bits from 2 to 8"):
            parse_budgets(text)

    @pytest.mark.parametrize("text", ["", " , "])
    def test_empty_list(self, text: str) -> None:
        with pytest.raises(ValueError, match="received an empty list"):
            parse_budgets(text)

    def test_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=f"'best', expected some of {', '.join(STRATEGIES)}$"):
            parse_names("tss,best", STRATEGIES)
        with pytest.raises(ValueError, match=", ".join(PEERS)):
            parse_peers("other")

    @pytest.mark.parametrize("text", ["-1", "1.5", "a", "²"])
    def test_seed_that_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="expected integers from 0 on"):
            parse_seeds(text)

    def test_command_line_repeats_the_comparison(self, tmp_path: Path) -> None:
        options = CompareOptions((2.5, 3.0), ("tss",), ("peft",), ("modelopt_awq_w4",), (0, 1, 2))
        line = command_line(options, "my recipe.yaml", ["seed=1"], tmp_path / "table")
        assert line == (
            "treeq-export compare 'my recipe.yaml' --budgets 2.5,3 --strategies tss "
            "--finetune peft --peers modelopt_awq_w4 --seeds 0,1,2 --out table --set seed=1"
        )
        plain = command_line(CompareOptions((3.0,), ("tss",)), "r.yaml", (), tmp_path)
        assert "--finetune" not in plain
        assert "--seeds" not in plain


class TestCells:
    def test_every_strategy_at_every_budget_trained_after_untrained(self, recipe: Recipe) -> None:
        options = CompareOptions((2.5, 3.0), ("uniform", "tss"), ("peft", "none"))
        cells = make_cells(recipe, options)
        assert [cell.name for cell in cells] == [
            "uniform-2.5",
            "uniform-2.5-peft",
            "tss-2.5",
            "tss-2.5-peft",
            "uniform-3",
            "uniform-3-peft",
            "tss-3",
            "tss-3-peft",
        ]
        assert [cell.base for cell in cells[:2]] == [None, "uniform-2.5"]
        assert [cell.variant for cell in cells[:2]] == ["ptq", "peft"]
        assert [cell.recipe.finetune.mode for cell in cells[:2]] == ["none", "peft"]
        assert cells[1].recipe.finetune.steps == 7
        search = cells[2].recipe.search
        assert search.strategy == "tss"
        assert search.budget is not None
        assert (search.budget.weight_bits, search.budget.activation_bits) == (2.5, 2.5)

    def test_what_cells_share(self, recipe: Recipe) -> None:
        shared = shared_recipe(recipe, CompareOptions((3.0,), ("tss",)))
        section = shared.evaluate
        assert (section.runner, section.baseline, section.seeds) == ("torch", None, [4, 5, 6])
        assert section.gates.min_psnr_db is None
        chosen = shared_recipe(recipe, CompareOptions((3.0,), ("tss",), seeds=(9,)))
        assert chosen.evaluate.seeds == [9]

    @pytest.mark.parametrize("seeds", [[0], [0, 1], [2, 2, 2]])
    def test_too_few_seeds(self, recipe: Recipe, seeds: list[int]) -> None:
        section = recipe.evaluate.model_copy(update={"seeds": seeds})
        few = recipe.model_copy(update={"evaluate": section})
        with pytest.raises(RecipeError, match=r"expected at least 3 .* Give --seeds 0,1,2"):
            shared_recipe(few, CompareOptions((3.0,), ("tss",)))

    def test_cells_of_a_table_differ_in_their_own_only(self, recipe: Recipe) -> None:
        options = CompareOptions((2.5, 3.0), STRATEGIES, ("peft", "qat"))
        parts: list[dict[str, Any]] = [
            comparable_part(cell.recipe.model_dump(mode="json", by_alias=True))
            for cell in make_cells(recipe, options)
        ]
        assert all(part == parts[0] for part in parts)
        other = recipe.model_copy(update={"seed": 1}).model_dump(mode="json", by_alias=True)
        assert comparable_part(other) != parts[0]
