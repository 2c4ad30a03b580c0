"""Plugins and the Hypothesis profile of the project's own tests."""

pytest_plugins = "pytester"

try:
    from hypothesis import settings
except ModuleNotFoundError:  # an extra of its own: running the benchmarks does not need it
    pass
else:
    settings.register_profile("int8bench", deadline=None, derandomize=True)
    settings.load_profile("int8bench")
