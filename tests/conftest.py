"""Tests use the real classes at tiny size; shapes written in signatures are not trusted, they are compared."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

THREADS = int(os.environ.get("SWIFTI2V_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
settings.register_profile("swifti2v", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
settings.load_profile("swifti2v")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)  # the command line's --threads lasts as long as the process: bits may depend on it
