from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbits.errors import DataError, ExportError, RecipeError
from fewbits.recipes.revisit import Finished, bench, reverify
from fewbits.recipes.runner import run
from fewbits.recipes.writing import write_text
from fewbits.tasks.generate import generate
from tests.recipes.test_texts import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a language model, without an ONNX file."""
    path = tmp_path_factory.mktemp("language") / "run"
    run(recipe(export=None).smoked(), path, say=lambda text: None)
    return path


def test_what_is_written_is_what_the_packed_model_says(folder: Path) -> None:
    found = write_text(folder, "def ", 9, threads=1)
    model = Finished.open(folder).packed()
    tokens = generate(model, torch.tensor([list(b"def ")]), 9)[0, 4:]
    assert found["text"] == bytes(tokens.tolist()).decode("utf-8", errors="replace")
    assert found["tokens"] == 9 and found["tokens_per_second"] > 0 and found["float_tokens_per_second"] > 0
    assert write_text(folder, "def ", None, threads=1)["tokens"] == 13, "what the context of 16 leaves"


def test_what_cannot_be_written_is_told(folder: Path, finished_run: Path) -> None:
    with pytest.raises(RecipeError, match="only a language model writes.*'classification'"):
        write_text(finished_run, "a", 1, 1)
    with pytest.raises(DataError, match="4 tokens and 14 more do not fit"):
        write_text(folder, "def ", 14, 1)
    with pytest.raises(DataError, match="17 tokens fills the context of 16"):
        write_text(folder, 17 * "a", None, 1)
    with pytest.raises(DataError, match="at least one token"):
        write_text(folder, "", None, 1)


def test_a_run_without_onnx_is_timed_in_torch_and_says_how_to_export(folder: Path) -> None:
    assert set(bench(folder, 2, 1, 1)["ms"]) == {"torch float", "torch quantized"}
    with pytest.raises(ExportError, match="write it with 'fewbits export'"):
        reverify(folder, None, 1)
