"""vidsparse: sparse attention for video and image diffusion transformers."""

__version__ = "0.1.0"
