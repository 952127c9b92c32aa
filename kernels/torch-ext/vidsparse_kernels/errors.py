"""The one error type that is this package's own; wrong arguments raise ValueError or TypeError."""

from __future__ import annotations


class UnsupportedBackendError(RuntimeError):
    """The backend asked for by name cannot do this case; the message says which backend can."""
