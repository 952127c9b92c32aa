"""The checker's file: weights, configuration and scores in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vidsparse.errors import ModelLoadError
from vidsparse_pipelines.clips.checker.network import Checker, CheckerConfig
from vidsparse_pipelines.clips.checker.scoring import Scores

#: Where the trained checker is kept in the package.
DEFAULT_PATH = Path(__file__).parents[1] / "checker.safetensors"


def save_checker(checker: Checker, path: Path | str = DEFAULT_PATH, scores: Scores | None = None) -> None:
    """Write weights (fp16; running statistics fp32), configuration and scores to one safetensors file.

    Args:
        checker: What to save.
        path: The file; it is written under a temporary name, then renamed.
        scores: On held-out real clips; `checker.scores` where not given.
    """
    scores = scores or checker.scores
    metadata = {"format": "vidsparse-checker-1", "config": json.dumps(checker.config.__dict__)}
    if scores is not None:
        metadata["scores"] = json.dumps(scores.as_dict())
    tensors = {
        k: v.detach()
        .cpu()
        .to(torch.float16 if v.is_floating_point() and "running_" not in k else v.dtype)
        .contiguous()
        for k, v in checker.state_dict().items()
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    temporary.chmod(0o644)
    temporary.replace(path)


def load_checker(path: Path | str | None = None, device: torch.device | str = "cpu") -> Checker:
    """Read a checker, in eval mode and float32.

    The one in the package finds every attribute of a real clip in 98 % of held-out clips of 81 frames and in 94 % of
    49. Do not use it on shorter ones: at 25 frames it is right in 67 %, since motion needs time to show.

    Args:
        path: File of `save_checker`; the one in the package where None.
        device: Where to put it.

    Raises:
        ModelLoadError: the file is missing or is not a checker.
    """
    file = Path(path) if path is not None else DEFAULT_PATH
    if not file.is_file():
        raise ModelLoadError(
            f"There is no prompt checker at {str(file)!r}; give the path of one, or train one with "
            "scripts/train_tiny_model.py --checker FILE."
        )
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            checker = Checker(CheckerConfig(**json.loads(metadata["config"])))
            checker.load_state_dict({k: f.get_tensor(k).float() for k in f.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ModelLoadError(
            f"{str(file)!r} is not a readable prompt checker ({reason}); train one with "
            "scripts/train_tiny_model.py --checker FILE."
        ) from error
    if "scores" in metadata:
        checker.scores = Scores.from_dict(json.loads(metadata["scores"]))
    return checker.to(device).eval()
