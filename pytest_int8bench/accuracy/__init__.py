"""Accuracy of a quantized model against its baseline."""
