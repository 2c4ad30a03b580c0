"""Compile models with ``torch.compile`` under the same settings for every call."""
