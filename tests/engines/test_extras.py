# SPDX-License-Identifier: Apache-2.0
"""A missing engine is a skip, unless it must be there."""

import pytest
from extras import REQUIRED, needs


def test_a_missing_engine_skips(monkeypatch):
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_engine is not installed"):
        needs("no_such_engine")


def test_a_missing_engine_fails_where_it_is_required(monkeypatch):
    monkeypatch.setenv(REQUIRED, "json,no_such_engine")
    with pytest.raises(pytest.fail.Exception, match="no_such_engine must be installed here"):
        needs("no_such_engine")
    assert needs("json").__name__ == "json"
