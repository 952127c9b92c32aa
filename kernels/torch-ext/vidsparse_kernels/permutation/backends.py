"""Which of "reference" and "triton" works on a tensor."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

from ..errors import UnsupportedBackendError

BACKENDS = ("reference", "triton")


def use_triton(backend: str, x: Tensor, obstacle: str | None = None) -> bool:
    """Whether to run the Triton kernels.

    Args:
        backend: "auto", "reference" or "triton".
        x: the tensor to work on.
        obstacle: why the kernels cannot do this case, as the end of a sentence that starts with the backend's name.

    Raises:
        ValueError: there is no such backend.
        UnsupportedBackendError: "triton" was asked for by name and cannot do this case.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS)}, got "{backend}".')
    if find_spec("triton") is None:
        obstacle = "needs the package triton"
    elif x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = "needs a GPU"
    elif x.device.type not in ("cpu", "cuda"):
        obstacle = f"needs a CUDA or ROCm GPU, got {x.device.type}"
    if backend == "triton" and obstacle:
        raise UnsupportedBackendError(f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.')
    # The interpreter is for tests: it runs only when asked for by name.
    return backend == "triton" or backend == "auto" and obstacle is None and x.device.type != "cpu"
