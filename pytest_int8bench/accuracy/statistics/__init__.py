"""Paired tests of non-inferiority."""
