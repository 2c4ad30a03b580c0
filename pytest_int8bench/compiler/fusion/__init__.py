"""Graph passes that replace INT8 linear layers by fused operators."""
