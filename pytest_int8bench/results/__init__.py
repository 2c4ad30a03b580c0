"""Saved results: records, the journal, and reading them back."""

from pytest_int8bench.results.reading import read as read
from pytest_int8bench.results.records import Saved as Saved
from pytest_int8bench.results.records import SchemaError as SchemaError
