"""The packaged benchmark tests that :mod:`pytest_int8bench.runner` runs."""
