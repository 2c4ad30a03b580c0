"""Triton kernels, one kind a file."""
