# SPDX-License-Identifier: Apache-2.0
"""One thread for every test: policies here are so small that a second thread only waits, and slows busy machines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
