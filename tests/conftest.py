"""The suite runs in two processes (``-n 2`` of pytest-xdist, setup.cfg), so each takes one thread: two that compute on small
tensors at once would mostly wait for each other. Set before torch is imported; child processes inherit it."""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
