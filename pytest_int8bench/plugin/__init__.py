"""The pytest plugin. The entry point names this package; :mod:`.hooks` defines its hooks.

Never change the path of the entry point: ``int8bench ab`` runs other revisions with the installed
metadata of this one.
"""

from pytest_int8bench.plugin.hooks import *  # noqa: F403
