"""Saved results: records, the journal, and reading them back."""
