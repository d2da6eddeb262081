"""What tests of kernels share."""

from __future__ import annotations

import importlib
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch):
    """Triton 3.6's interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for loop bounds."""
    if INTERPRETED:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        original = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
