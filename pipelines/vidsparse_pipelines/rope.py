"""Position encodings of Wan stretched along time, for videos longer than the model was trained on."""

from __future__ import annotations

from typing import Any

from vidsparse.errors import ConfigError

INTERPOLATION, NTK = "interpolation", "ntk"
ROPE_KINDS = (INTERPOLATION, NTK)


def stretch_time(transformer: Any, kind: str, factor: float) -> None:
    """Stretch a Wan transformer's rotary embedding along time, in place; height and width stay as they are.

    Args:
        transformer: with diffusers' own `WanRotaryPosEmbed`.
        kind: "interpolation" divides every frame's position by `factor` (arXiv 2306.15595); "ntk" raises the base to
            theta * factor^(d / (d - 2)), which slows the lowest frequency by `factor` and leaves the highest.
        factor: at least 1, usually new over old number of latent frames.

    Raises:
        ConfigError: the kind or factor is wrong, or the model has another position encoding.
    """
    import torch
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    if kind not in ROPE_KINDS:
        raise ConfigError(f"`rope` must be one of {', '.join(ROPE_KINDS)}, got {kind!r}.")
    if not factor >= 1:
        raise ConfigError(f"`rope_factor` must be at least 1, got {factor}.")
    rope: Any = getattr(transformer, "rope", None)
    if type(rope).__name__ != "WanRotaryPosEmbed":
        raise ConfigError(f"`rope` stretches the positions of Wan, not those of {type(transformer).__name__}.")
    dim = rope.t_dim
    how = {"linear_factor": factor} if kind == INTERPOLATION else {"ntk_factor": factor ** (dim / (dim - 2))}
    cos, sin = get_1d_rotary_pos_embed(
        dim, rope.max_seq_len, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64, **how
    )
    rope.freqs_cos[:, :dim] = cos.to(rope.freqs_cos)
    rope.freqs_sin[:, :dim] = sin.to(rope.freqs_sin)
