"""The tests, in folders that mirror the package's."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
