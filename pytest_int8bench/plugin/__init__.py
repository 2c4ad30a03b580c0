"""The pytest plugin. The entry point names this package; its hooks stand in :mod:`.hooks`.

The path of the entry point never changes: ``int8bench ab`` runs other revisions with the
installed metadata of this one.
"""

from pytest_int8bench.plugin.hooks import *  # noqa: F403
