"""Triton kernels of vidsparse, each beside its plain torch reference."""
