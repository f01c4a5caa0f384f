"""Fixtures of the tests of training."""

from __future__ import annotations

from s3_server import far_store, s3, s3_running

__all__ = ["far_store", "s3", "s3_running"]
