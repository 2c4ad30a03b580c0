"""Workarounds for bugs and costs of torch, and the private names of torch that the compiler needs.

Each docstring names the problem, the affected versions of torch, and the upstream issue or the
place in torch's source. Delete a workaround when the oldest supported torch no longer needs it.

Modules outside this package set private options (``torch._dynamo.config`` and
``torch._functorch.config`` in :mod:`..compiled_model`, :mod:`..entries` and :mod:`..cache`) and
read the counters in ``torch._dynamo.utils``, but patch nothing.
"""
