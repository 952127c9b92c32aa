"""Load a diffusers pipeline, attach a sparse method, generate, write the video."""
