"""Sections of a report page, one file each."""
