"""Sessions of pytest-xdist with one GPU per worker."""
