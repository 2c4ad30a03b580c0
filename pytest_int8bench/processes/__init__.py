"""Child processes of pytest, and the files they exchange."""
