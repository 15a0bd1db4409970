"""One thread for every test: results don't depend on the machine, nor times on who else uses it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

import torch

torch.set_num_threads(1)
