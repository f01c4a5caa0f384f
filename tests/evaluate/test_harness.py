from __future__ import annotations

import importlib.util

import pytest

from raydistill.errors import ConfigError
from raydistill.evaluate.harness import require_harness


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"raydistill\[lm-eval\]"):
        require_harness(["piqa"])
