"""torch.compile with settings that are the same on every call."""
