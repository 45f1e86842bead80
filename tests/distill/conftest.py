"""What the tests of distillation share."""

import sys
import types

import pytest


@pytest.fixture
def users_code(monkeypatch):
    """An empty module of the user's; what is put into it is named ``users_code:…``."""
    made = types.ModuleType("users_code")
    monkeypatch.setitem(sys.modules, "users_code", made)
    return made
