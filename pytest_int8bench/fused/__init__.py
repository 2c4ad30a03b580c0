"""The fused INT8 backend: Triton kernels, the operators around them, and the rewriting of models
so that they run."""
