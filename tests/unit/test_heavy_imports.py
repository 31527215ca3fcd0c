"""Imports of torch are not gone through for garbage, and everything after them is."""

from __future__ import annotations

import gc
import sys

import pytest
import torch  # noqa: F401 - is to be there

from ofa_ds.cli.heavy_imports import heavy_imports


@pytest.fixture
def before_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    yield
    gc.unfreeze()


def test_the_collector_rests_while_torch_is_imported_and_leaves_its_objects_alone(before_torch):
    frozen = gc.get_freeze_count()
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > frozen + 10_000


def test_the_collector_works_again_after_an_import_that_failed(before_torch):
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError("no torch")
    assert gc.isenabled()


def test_nothing_happens_where_torch_is_there_already():
    frozen = gc.get_freeze_count()
    with heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
