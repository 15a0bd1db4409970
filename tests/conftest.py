"""One thread for every test: results don't depend on the machine, nor times on who else uses it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CONTRIBUTING.md says which tests take a GPU

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # asked when Triton is imported, so before any test

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment_as_it_was():
    """Lightning leaves a run's MASTER_PORT behind, on which the next runs would meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
