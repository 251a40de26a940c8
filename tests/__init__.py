"""Tests of everything but the method itself, which test_fdflow.py tests."""
