"""Samples for training: clips of the renderer or a folder of videos, encoded once and kept on disk."""

from vidsparse_lora.data.batches import Batch, Batches
from vidsparse_lora.data.cache import LatentCache, Sample
from vidsparse_lora.data.clips import drawn_clips
from vidsparse_lora.data.folder import folder_videos
from vidsparse_lora.data.prompts import Prompts, prompt_list

__all__ = ["Batch", "Batches", "LatentCache", "Prompts", "Sample", "drawn_clips", "folder_videos", "prompt_list"]
