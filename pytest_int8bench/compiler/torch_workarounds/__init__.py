"""Workarounds for bugs and costs of torch, and the private names of torch that the compiler needs.

Each docstring names the problem, the versions of torch that have it, and the upstream issue or the
place in torch's source. Delete a workaround when the oldest supported torch no longer needs it.

Two things stand elsewhere, because they configure or observe and do not patch: the settings that
:mod:`..compiled_model` and :mod:`..cache` take from ``torch._dynamo.config`` and
``torch._functorch.config``, and the counters that they read in ``torch._dynamo.utils``.
"""
