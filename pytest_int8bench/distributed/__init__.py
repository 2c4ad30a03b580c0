"""Sessions of several workers, each with a GPU of its own, under pytest-xdist."""
