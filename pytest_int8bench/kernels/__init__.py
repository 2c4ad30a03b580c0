"""INT8 kernels in Triton, their operators, and the linear layer that calls them."""
