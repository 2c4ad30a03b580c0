"""Comparing commits: saved files, and two revisions measured in alternation."""
