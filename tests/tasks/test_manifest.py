from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import DataError
from fewbits.tasks.manifest import fitzpatrick17k, isic2019, make_splits, read_manifest

HEAD = "path,label,group,age,split"
LINES = ["a.jpg,cat,f,old,train", "b.jpg,dog,m,young,test", "c.jpg,cat,,old,val", "d.jpg,dog,unknown,young,train"]


def written(folder: Path, lines: list[str], head: str = HEAD) -> Path:
    file = folder / "manifest.csv"
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return file


def test_unknown_groups_are_dropped_kept_or_a_group(tmp_path: Path) -> None:
    file = written(tmp_path, LINES)
    found = read_manifest(file)
    assert found.paths == ("a.jpg", "b.jpg") and found.dropped == {"unknown group": 2}
    assert found.classes == ("cat", "dog") and found.group_names == ("f", "m") and found.splits == ("train", "test")
    kept = read_manifest(file, unknown="keep")
    assert kept.groups.tolist() == [0, 1, -1, -1] and kept.labels.tolist() == [0, 1, 0, 1]
    named = read_manifest(file, unknown="group")
    assert named.group_names == ("f", "m", "unknown") and named.groups.tolist() == [0, 1, 2, 2]
    assert named.rows("train").tolist() == [0, 3]


def test_groups_of_several_columns_are_their_combinations(tmp_path: Path) -> None:
    found = read_manifest(written(tmp_path, LINES), group=["group", "age"])
    assert found.group_names == ("f x old", "m x young")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": "grup"}, r"no column 'grup'.*did you mean 'group'.*columns are \['path', 'label'"),
        ({"label": "y"}, "no column 'y'"),
        ({"classes": ["cat"]}, r"b\.jpg has the label 'dog'"),
        ({"unknown": "guess"}, "can be one of"),
    ],
)
def test_columns_and_classes_that_do_not_fit_are_told(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_manifest(written(tmp_path, LINES), **options)  # type: ignore[arg-type]


def test_lines_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: path and label must not be empty"):
        read_manifest(written(tmp_path, ["a.jpg,,f,old,train"]))
    with pytest.raises(DataError, match=r"a\.jpg has the split 'dev'"):
        read_manifest(written(tmp_path, ["a.jpg,cat,f,old,dev"]))
    with pytest.raises(DataError, match=r"no image of a known group \(1 were dropped\)"):
        read_manifest(written(tmp_path, ["a.jpg,cat,,old,train"]))
    with pytest.raises(DataError, match="cannot read the manifest"):
        read_manifest(tmp_path / "none.csv")


def test_splits_are_stratified_and_repeat() -> None:
    labels, groups = torch.randint(3, (400,)), (torch.rand(400) < 0.2).long()
    splits = make_splits(labels, groups)
    assert splits == make_splits(labels, groups) and splits != make_splits(labels, groups, seed=1)
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        chosen = torch.tensor([s == name for s in splits])
        for label in range(3):
            for group in range(2):
                cell = (labels == label) & (groups == group)
                assert abs(int((chosen & cell).sum()) - share * int(cell.sum())) <= 2


def test_small_strata_go_to_train_with_a_warning() -> None:
    labels, groups = torch.zeros(54, dtype=torch.long), torch.tensor([0] * 50 + [1] * 4)
    with pytest.warns(UserWarning, match="4 images of"):
        assert set(make_splits(labels, groups)[50:]) == {"train"}


def test_what_belongs_together_is_not_parted() -> None:
    labels, groups = torch.randint(2, (300,)), torch.randint(2, (300,))
    names = [f"lesion {i // 3}" if i % 7 else "" for i in range(300)]
    splits = make_splits(labels, groups, names)
    by_name: dict[str, set[str]] = {}
    for name, split in zip(names, splits):
        by_name.setdefault(name, set()).add(split)
    assert all(len(found) == 1 for name, found in by_name.items() if name) and len(by_name[""]) == 3


def test_the_fitzpatrick17k_layout(tmp_path: Path) -> None:
    head = "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,qc,url"
    lines = [f"h{i},{scale},1,{'acne' if i % 2 else 'lupus'},,u" for i, scale in enumerate([1, 3, 4, 6, -1] * 10)]
    found = fitzpatrick17k(written(tmp_path, lines, head))
    assert found.group_names == ("dark", "light") and found.dropped == {"unknown group": 10}
    assert (
        found.paths[0] == "h0.jpg"
        and found.classes == ("acne", "lupus")
        and set(found.splits) == {"train", "val", "test"}
    )
    by_type = fitzpatrick17k(written(tmp_path, lines, head), group="type")
    assert by_type.group_names == ("type 1", "type 3", "type 4", "type 6")
    with pytest.raises(DataError, match="no column 'fitzpatrick_scale'"):
        fitzpatrick17k(written(tmp_path, [], "md5hash,label"))


def test_the_isic2019_layout(tmp_path: Path) -> None:
    truth, about = tmp_path / "truth.csv", tmp_path / "about.csv"
    lines = [f"I{i},{1.0 - i % 2},{float(i % 2)},0.0" for i in range(60)]
    truth.write_text("\n".join(["image,MEL,NV,UNK", *lines]))
    people = [f"I{i},50,head,L{i // 2 * 2},{('female', 'male', '')[i % 3]}" for i in range(60)]
    about.write_text("\n".join(["image,age_approx,anatom_site_general,lesion_id,sex", *people]))
    found = isic2019(truth, about)
    assert found.classes == ("MEL", "NV"), "UNK never occurs"
    assert found.group_names == ("female", "male") and found.dropped == {"unknown group": 20}
    lesion = {}
    for path, split in zip(found.paths, found.splits):
        number = int(path.removeprefix("I").removesuffix(".jpg"))
        assert lesion.setdefault(number // 2, split) == split
