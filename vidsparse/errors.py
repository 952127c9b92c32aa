"""Typed errors. Every message is one sentence: the value given, what is allowed, what to do."""

from __future__ import annotations


class VidsparseError(Exception):
    """Base of every error that vidsparse raises on purpose; the CLI prints it and exits with code 2."""


class ConfigError(VidsparseError, ValueError):
    """A setting is outside what is allowed."""


class UnsupportedModelError(VidsparseError):
    """The model's family is not one that vidsparse can attach to."""


class UnboundProcessorError(VidsparseError, RuntimeError):
    """A vidsparse processor was called without being bound to a model."""


class DenseFallbackError(VidsparseError, RuntimeError):
    """`strict` is on and an attention call would have run dense or on a slow path."""


class ModelLoadError(VidsparseError):
    """A pipeline, a LoRA or one of their files cannot be found or read."""


class OutputError(VidsparseError, OSError):
    """The result cannot be written where it was asked for."""


class OutOfMemory(VidsparseError, MemoryError):
    """The device ran out of memory; the message says what would fit."""
