"""Weights of public SLA checkpoints: which of their names belong to which attention module here.

A layer of github.com/thu-ml/TurboDiffusion (and of github.com/thu-ml/SLA put into Wan's own code) holds its projection as
`blocks.0.self_attn.attn_op.local_attn.proj_l.weight` `[head_dim, head_dim]` and `.bias` `[head_dim]`, in fp32; trained models
are saved under `net.`. The files say nothing about their selection: their code takes the softmax feature map and all keys
(`turbodiffusion/SLA/core.py`), blocks of 128 queries and 64 keys (`turbodiffusion/inference/modify_model.py`), so a recipe
that says otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse.selection.blocks import block_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from vidsparse.methods.sparse_linear import SparseLinearConfig

TRAINED_WITH = {"feature_map": "softmax", "coverage": "all", "skip": 0.0, "spread": False}
BLOCK_SIZES = 128, 64
PREFIXES = ("net.", "model.", "module.")
PUBLIC_NAME = re.compile(r"(.*?\.)(?:attn_op\.)?(?:local_attn\.)?proj_l\.(weight|bias)")


def from_public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Wan checkpoint of TurboDiffusion, or its projections alone, under the names that diffusers has.

    Args:
        state: tensors by public name, or by name here (then they stay).

    Returns:
        The tensors by name here, a patch embedding in the shape of a convolution; nothing is copied.

    Raises:
        ModelLoadError: the checkpoint is quantised.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    found = {}
    for name, tensor in state.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name.endswith((".int8_weight", "_extra_state")):
            if name.endswith(".int8_weight"):
                raise ModelLoadError(
                    f"The checkpoint is quantised ({name!r} is int8), which diffusers' layers cannot take; give the "
                    "unquantised one (without -quant in its name)."
                )
            continue
        match = PUBLIC_NAME.fullmatch(name)
        if match is not None:
            name = f"{match[1]}proj_l.{match[2]}"
        if name == "patch_embedding.weight" and tensor.ndim == 2:
            # Written as a linear layer over channels, frames, rows, columns of a patch of 1 x 2 x 2.
            tensor = tensor.unflatten(1, (-1, 1, 2, 2))
        found[name] = tensor
    if any(".self_attn." in name for name in found):
        found = convert_wan_transformer_to_diffusers(found)
    return found


def check_selection(config: SparseLinearConfig, num_tokens: int | None = None) -> None:
    """Refuse a recipe that differs from what public checkpoints were trained with.

    Args:
        config: of the method "sla".
        num_tokens: of the calls to come, where it is known; short ones have smaller blocks.

    Raises:
        ConfigError: names both values.
    """
    for name, trained in TRAINED_WITH.items():
        given = getattr(config, name)
        if given != trained:
            raise ConfigError(
                f"Public SLA checkpoints were trained with `{name}` {trained!r}, and the recipe has {given!r}; leave "
                f"`{name}` out."
            )
    if config.kv_block_size not in (None, BLOCK_SIZES[1]):
        raise ConfigError(
            f"Public SLA checkpoints were trained with blocks of {BLOCK_SIZES[1]} keys, and the recipe has "
            f"`kv_block_size` {config.kv_block_size}; leave `kv_block_size` out."
        )
    sizes = BLOCK_SIZES if num_tokens is None else block_sizes(num_tokens, config.kv_block_size)
    if sizes != BLOCK_SIZES:
        raise ConfigError(
            f"Public SLA checkpoints run with blocks of {BLOCK_SIZES[0]} queries and {BLOCK_SIZES[1]} keys, and "
            f"{num_tokens:,} tokens are cut into blocks of {sizes[0]} and {sizes[1]}; take at least 4,096 tokens."
        )


def load_public(transformer: Any, state: Mapping[str, Tensor], num_tokens: int | None = None) -> int:
    """Fill a transformer that is bound to the method "sla" from a public checkpoint.

    Args:
        transformer: a WanTransformer3DModel after `set_attn_processor(SparseLinearProcessor(...))`.
        state: the checkpoint, or its projections alone; names and shapes as above.
        num_tokens: of the calls to come, checked where it is given.

    Returns:
        How many projections were filled.

    Raises:
        ConfigError: the transformer is not bound to "sla", or its recipe differs from what the checkpoint was trained with.
        ModelLoadError: a tensor is missing, is one too many or has another shape; nothing is changed then.

    Example:
        >>> model.set_attn_processor(SparseLinearProcessor(density=0.1))
        >>> load_public(model, torch.load("TurboWan2.1-T2V-1.3B-480P.pth", map_location="cpu", weights_only=True))
        30
    """
    from vidsparse.processors.binding import BINDING, PROJECTION

    binding = getattr(transformer, BINDING, None)
    processor = getattr(binding, "processor", None)
    if processor is None or processor.method != "sla":
        method = "no method" if processor is None else repr(processor.method)
        raise ConfigError(f"A public SLA checkpoint needs a transformer with the method 'sla', got {method}.")
    check_selection(processor.config, num_tokens)
    own = transformer.state_dict()
    found = from_public_names(state)
    projections = {name for name in own if f".{PROJECTION}." in name}
    wanted = projections if found.keys() <= projections else own.keys()
    missing, strange = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or strange:
        which = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which the model lacks"
        raise ModelLoadError(f"The SLA checkpoint does not fit this model: it {which}.")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise ModelLoadError(
                f"The SLA checkpoint does not fit this model: {name!r} has shape {list(tensor.shape)}, the model "
                f"{list(own[name].shape)}."
            )
    transformer.load_state_dict(found, strict=False)
    return sum(name.endswith(f".{PROJECTION}.weight") for name in found)
