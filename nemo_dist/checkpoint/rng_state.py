"""The states of this rank's random number generators: torch's, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """Return the generator states of this rank, as plain values and tensors.

    CUDA's is included when CUDA is initialised, NumPy's when NumPy is imported.
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def check(states: dict[str, Any]) -> None:
    """Raise the error that ``restore`` would raise for malformed *states*; changes no generator."""
    torch.Generator().set_state(states["torch"])
    random.Random().setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.Generator("cuda").set_state(states["cuda"])
    if "numpy" in states:
        import numpy as np

        np.random.RandomState().set_state(states["numpy"])


def restore(states: dict[str, Any]) -> None:
    """Restore the generator states that ``capture`` returned; generators that *states* lacks are left alone."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])
