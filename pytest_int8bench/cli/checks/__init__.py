"""What ``int8bench doctor`` looks at: one function a check, one row each in :mod:`.registry`."""
