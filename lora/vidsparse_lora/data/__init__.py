"""Samples for training: clips of the renderer, of a folder or of the model itself, encoded once and kept on disk."""

from vidsparse_lora.data.batches import Batch, Batches
from vidsparse_lora.data.cache import LatentCache, Sample
from vidsparse_lora.data.clips import drawn_clips
from vidsparse_lora.data.folder import folder_videos
from vidsparse_lora.data.prompts import Prompts, prompt_list
from vidsparse_lora.data.self_made import SELF, self_made

__all__ = [
    "SELF",
    "Batch",
    "Batches",
    "LatentCache",
    "Prompts",
    "Sample",
    "drawn_clips",
    "folder_videos",
    "prompt_list",
    "self_made",
]
