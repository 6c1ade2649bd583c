"""The finished run that tests may read but not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.runs import shared_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke run."""
    return shared_run(tmp_path_factory)
