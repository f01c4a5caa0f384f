"""Fixtures of the cache tests."""

from conftest_cache import built, built_once, in_process, make_config, toy_text

__all__ = ["built", "built_once", "in_process", "make_config", "toy_text"]
