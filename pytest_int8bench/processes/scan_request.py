"""Pass the settings of ``int8bench sensitivity`` to the process that scans the layers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

_REQUEST = "INT8BENCH_SCAN"


@dataclass(frozen=True)
class ScanRequest:
    """Settings of a scan, passed in an environment variable."""

    by: str
    """``layer`` or ``block``."""
    metric: bool
    """Whether to score each layer or block on labelled samples too."""
    parent: int = field(default_factory=os.getpid)
    """Process id of the command."""

    @classmethod
    def from_env_vars(cls, environ: Mapping[str, str] | None = None) -> ScanRequest:
        """Read the request that :meth:`to_env_vars` wrote.

        Raises:
            RuntimeError: if the variable is not set.
        """
        environ = os.environ if environ is None else environ
        if _REQUEST not in environ:
            raise RuntimeError(
                f"this test can only be run by int8bench sensitivity, which sets {_REQUEST}"
            )
        return cls(**json.loads(environ[_REQUEST]))

    def is_started_by(self, pid: int) -> bool:
        """Return whether the process ``pid`` created the request."""
        return pid == self.parent

    def to_env_vars(self) -> dict[str, str]:
        """Return the environment variable that holds the request."""
        return {_REQUEST: json.dumps(asdict(self))}
