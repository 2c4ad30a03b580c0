"""Interleaved A/B measurement of two revisions on one machine."""
