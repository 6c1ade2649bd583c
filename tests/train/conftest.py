from __future__ import annotations

import pytest

from . import workers


@pytest.fixture(scope="session")
def warm_server() -> None:
    """Start the server that processes are forked from, and let it import what takes long."""
    process = workers.start(int)
    process.join()
    assert process.exitcode == 0
