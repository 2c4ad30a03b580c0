"""Quantize linear layers to INT8 with TorchAO."""
