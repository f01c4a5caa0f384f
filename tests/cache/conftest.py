"""Fixtures of the cache tests."""

from collections.abc import Iterator

import pytest
from conftest_cache import built, built_once, in_process, make_config, toy_text
from s3_server import far_store, s3, s3_running

from raydistill import storage

__all__ = ["built", "built_once", "far_store", "in_process", "make_config", "s3", "s3_running", "toy_text"]


@pytest.fixture(autouse=True, scope="session")
def without_sync() -> Iterator[None]:
    """Files are not synced to the disk: that is for power cuts, which no test makes, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_sync", lambda path: None)
        yield
