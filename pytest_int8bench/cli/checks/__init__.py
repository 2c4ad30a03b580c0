"""The checks of ``int8bench doctor``: one function and one row in :mod:`.registry` each."""
