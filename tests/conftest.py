"""What every test starts from: one thread, fixed seeds, and reproducible hypothesis runs."""

from __future__ import annotations

import os
import random

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", deadline=None, suppress_health_check=slow_is_fine, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
