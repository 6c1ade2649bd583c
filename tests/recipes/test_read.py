from __future__ import annotations

from pathlib import Path

import pytest

from fewbits.errors import RecipeError
from fewbits.recipes.read import find, names, parse, read, write

MINIMAL = {"data": {"source": "digits"}, "model": {"name": "reference_cnn"}, "plan": {"weight_bits": 2}}


def test_the_promised_recipes_are_there() -> None:
    assert {"digits", "cifar10_resnet20"} <= set(names())


def test_a_recipe_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write(parse(MINIMAL, "test"), path)
    assert find("digits").stem == "digits"
    assert find(str(path)) == path


def test_an_unknown_recipe_lists_near_names() -> None:
    with pytest.raises(RecipeError, match="no recipe 'digit'.*did you mean 'digits'"):
        find("digit")


@pytest.mark.parametrize(
    ("path", "near"),
    [(("plam",), "plan"), (("plan", "weight_bit"), "weight_bits"), (("qat", "epoch"), "epochs")],
)
def test_an_unknown_key_names_the_nearest_one(path: tuple[str, ...], near: str) -> None:
    data: dict[str, object] = {**MINIMAL, "qat": {"epochs": 1}}
    if len(path) == 1:
        data[path[0]] = {}
    else:
        section = data[path[0]]
        assert isinstance(section, dict)
        data[path[0]] = section | {path[1]: 1}
    with pytest.raises(RecipeError, match=f"my.yaml: unknown key '{'.'.join(path)}'; did you mean '{near}'"):
        parse(data, "my.yaml")


def test_an_unknown_key_far_from_all_lists_what_is_known() -> None:
    with pytest.raises(RecipeError, match="unknown key 'data.zzz'; known: .*'source', 'path'"):
        parse({**MINIMAL, "data": {"source": "digits", "zzz": 1}}, "my.yaml")


def test_a_missing_key_and_a_wrong_type_are_named() -> None:
    with pytest.raises(RecipeError, match="the key 'model' is missing"):
        parse({k: v for k, v in MINIMAL.items() if k != "model"}, "my.yaml")
    with pytest.raises(RecipeError, match=r"qat\.lr: .*number.*got 'fast'"):
        parse({**MINIMAL, "qat": {"epochs": 1, "lr": "fast"}}, "my.yaml")


@pytest.mark.parametrize("text", ["plan: [", "- a\n- b\n", "", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        read(path)


def test_changes_win_over_the_file_and_may_open_a_section() -> None:
    recipe = read(find("digits"), ["qat.epochs=3", "budget.average_bits=4", "plan.weight_bits=null", "qat.lr=1e-3"])
    assert recipe.qat is not None and (recipe.qat.epochs, recipe.qat.lr) == (3, 1e-3)
    assert recipe.budget is not None and recipe.budget.average_bits == 4
    assert read(find("digits"), ["qat=null"]).qat is None


@pytest.mark.parametrize("change", ["qat.epochs", "=3", "qat.=3", "seed.x=1", "qat.epochs=["])
def test_a_change_that_cannot_be_made_is_refused(change: str) -> None:
    with pytest.raises(RecipeError):
        read(find("digits"), [change])


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    for name in names():
        recipe = read(find(name))
        write(recipe, tmp_path / "copy.yaml")
        assert read(tmp_path / "copy.yaml") == recipe
        assert recipe.name == name
