from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.errors import CheckpointError
from fewbits.train import Checkpoints, checkpoint


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((5,), float(step)), "plan": {"rules": [["a", None]]}}


def steps(store: Checkpoints) -> list[int]:
    return [Checkpoints.read(path)["step"] for path in store.paths()]


def test_the_last_ones_stay_and_read_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    assert store.last_good() is None and store.paths() == []
    for step in (1, 2, 10, 100):
        path = store.save(step, state(step))
        assert store.last_good() == path
    assert steps(store) == [100, 10]
    assert torch.equal(Checkpoints.read(path)["weight"], torch.full((5,), 100.0))
    assert torch.load(path, weights_only=True)["plan"] == {"rules": [["a", None]]}  # a plain torch file


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_flipped_bit_and_any_cut_is_found(tmp_path: Path, place: float, bit: int, cut: bool) -> None:
    store = Checkpoints(tmp_path, keep=2)
    good = store.save(1, state(1))
    bad = store.save(2, state(2))
    payload = bytearray(bad.read_bytes())
    position = int(place * len(payload))
    payload[position] ^= 1 << bit
    bad.write_bytes(payload[:position] if cut else payload)
    with pytest.raises(CheckpointError, match=r"step_00000002.*is damaged"):
        Checkpoints.read(bad)
    with pytest.warns(UserWarning, match=r"step_00000002.*is damaged.*going back to step_00000001"):
        assert store.last_good() == good
    assert steps(store) == [1] and bad.with_suffix(".damaged").exists()


def test_a_damaged_one_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    bad = store.save(9, state(9))
    bad.write_bytes(b"")
    for _ in range(2):  # it stays an error: a run must not silently start anew
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole .*0 bytes.*start the run anew"):
            store.last_good()
    store.keep = 2
    good = store.save(3, state(3))
    with pytest.warns(UserWarning, match="step_00000009"):
        assert store.last_good() == good
    store.keep = 1
    store.save(4, state(4))
    assert steps(store) == [4]


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, state(1))

    def full(file: Any, payload: bytes) -> None:
        file.write(payload[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002.*No space left"):
        store.save(2, state(2))
    assert steps(store) == [1] and len(list(tmp_path.iterdir())) == 1


def test_what_was_written_wrongly_never_becomes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, state(1))
    monkeypatch.setattr(checkpoint, "_write", lambda file, payload: file.write(payload[:-1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        store.save(2, state(2))
    assert steps(store) == [1]


def test_a_file_of_another_name_is_not_read(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, keep=1).save(1, state(1)).rename(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="not named as a checkpoint"):
        Checkpoints.read(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write in .*file.*choose another output folder"):
        checkpoint.prepare_folder(tmp_path / "file" / "run")
