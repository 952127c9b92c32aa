"""Family: how a model's forward and modules are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vidsparse.errors import UnsupportedModelError
from vidsparse.layout import LatentGrid

Arguments = Mapping[str, Any]
"""Arguments of a transformer's forward by name; those left to their defaults are missing."""


def no_text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((0, 0),)


def path_ends_in(*names: str) -> Callable[[str, Any], bool]:
    """A target test: the last part of the module's path is one of these."""
    return lambda path, module: path.rpartition(".")[2] in names


def video_grid(arguments: Arguments, config: Any) -> LatentGrid:
    """The grid of latents `[batch, channels, frames, height, width]` under the config's patch sizes."""
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch = config.patch_size
    if not isinstance(patch, int):
        return LatentGrid(frames // patch[0], height // patch[1], width // patch[2])
    patch_frames = getattr(config, "patch_size_t", None) or 1
    return LatentGrid(frames // patch_frames, height // patch, width // patch)


def image_grid(arguments: Arguments, config: Any) -> LatentGrid:
    """The grid of latents `[batch, channels, ..., height, width]`, each image or frame on its own."""
    height, width = arguments["hidden_states"].shape[-2:]
    return LatentGrid(1, height // config.patch_size, width // config.patch_size)


def first_head(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[batch, num_heads, queries, keys]` that diffusers repeats for every head, once."""
    return mask[:, :1] if mask.ndim == 4 else mask


def no_obstacle(arguments: Arguments, config: Any) -> str | None:
    return None


def read_once(tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
    """What a function reads from a tensor on the host, kept on that tensor: one wait for the device in a generation."""
    kept = getattr(tensor, "_vidsparse_read", None)
    if kept is None or kept[0] != tensor._version:
        kept = (tensor._version, read(tensor))
        tensor._vidsparse_read = kept  # pyright: ignore[reportAttributeAccessIssue]
    return kept[1]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: for messages and documents.
        model_classes: names of the diffusers transformer classes; names, so that nothing is imported for them.
        is_target: (module path, attention module) -> whether it attends over the video (or image) tokens.
        grid: (arguments of forward by name, model config) -> latent grid; an image is one frame.
        text: (arguments, config) -> text and condition tokens (before, after) the video in the sequence of a target, the
            most first; several pairs where one forward makes calls of several lengths.
        processors: names of the family's processor classes whose code cannot run as it is, with those that stand in.
        refused: names of processor classes that cannot be taken over, with the sentence that says why.
        obstacle: (arguments, config) -> why this forward must stay dense, or None.
        key_mask: attention mask as the family's processor passes it -> the same where that can be one per key.
        per_sample: one attention call for each sample of a batch.
        pairwise_mask: masks over pairs of tokens have one row for all video tokens; the text comes first.
        hidden_states: name of the forward's argument that tells batch size, device and dtype of attention.
        timestep: name of the forward's timestep argument.
        rising_time: the timestep grows from step to step; nearly all families count it down.
    """

    name: str
    model_classes: tuple[str, ...]
    is_target: Callable[[str, Any], bool]
    grid: Callable[[Arguments, Any], LatentGrid]
    text: Callable[[Arguments, Any], Sequence[tuple[int, int]]] = no_text
    processors: Mapping[str, type] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    obstacle: Callable[[Arguments, Any], str | None] = no_obstacle
    key_mask: Callable[[torch.Tensor], torch.Tensor] | None = None
    per_sample: bool = False
    pairwise_mask: bool = False
    hidden_states: str = "hidden_states"
    timestep: str = "timestep"
    rising_time: bool = False

    def processor_class(self, original: type) -> type:
        """The class whose code runs in place of a processor of the family: nearly always that class itself.

        Raises:
            UnsupportedModelError: the family refuses this processor.
        """
        if original.__name__ in self.refused:
            raise UnsupportedModelError(self.refused[original.__name__])
        return self.processors.get(original.__name__, original)
