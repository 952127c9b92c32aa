"""The per-layer processor: the family's own `__call__` with only its attention call replaced."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from vidsparse.attention import sparse_attention
from vidsparse.errors import DenseFallbackError, UnboundProcessorError, UnsupportedModelError
from vidsparse.processors.context import AttentionContext

ATTENTION_MASK = "attention mask given"
CAUSAL = "causal attention asked for"
DROPOUT = "attention dropout asked for"


class LayerProcessor:
    """Mixed into a subclass of the family's processor; one instance per layer.

    The binding writes `sparse` and `context` before every forward. The traced code reads only the flag and the mask's
    tensors, so torch.compile makes one graph for sparse and one for dense calls, whatever the layer or step.
    """

    layer_index: int
    layer_name: str
    strict: bool
    sparse: bool
    context: AttentionContext | None
    called: bool
    late_reason: str | None
    recent: dict[int, AttentionContext]
    _attention_backend: Any
    _parallel_config: Any

    @property
    def vidsparse_layer(self) -> LayerProcessor:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: name the family's class instead.
        base = type(self).__mro__[2]
        return _restore, (base, dict(vars(self)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Attention of this layer on `[batch, seq_len, num_heads, head_dim]`, sparse or dense as the context says."""
        context, sparse = self.context, self.sparse
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Gradient checkpointing replays this layer inside a backward pass; other forwards may have run since.
            context = self.recent.get(query.shape[1], context)
            sparse = context is not None and context.block_mask is not None
        if context is None:
            raise UnboundProcessorError(
                "A vidsparse layer processor was called outside its model's forward; set a processor on the whole "
                "transformer with `set_attn_processor`, and do not reuse processors read from another model."
            )
        obstacle = _obstacle(**kwargs) if sparse else None
        if obstacle is not None:
            # Dense attention is exact for all of these.
            if self.strict:
                raise DenseFallbackError(
                    f"Layer {self.layer_name} would run dense ({obstacle}), because sparse attention cannot do that; "
                    "call the model without it or turn off `strict`."
                )
            self.late_reason = obstacle
            sparse = False
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            # Not inside a compiled checkpoint, where nothing outside may be written.
            self.called = True
        if not sparse:
            return dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config, **kwargs
            )
        return sparse_attention(query, key, value, context, scale=kwargs.get("scale"))


def _obstacle(*, attn_mask: Any = None, is_causal: bool = False, dropout_p: float = 0.0, **_: Any) -> str | None:
    """What in a call the sparse path cannot do, or None."""
    if attn_mask is not None:
        return ATTENTION_MASK
    if is_causal:
        return CAUSAL
    return DROPOUT if dropout_p else None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stands where the family's code calls `dispatch_attention_fn`; `backend` arrives as the layer's processor."""
    return backend.attend(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        attention_kwargs=attention_kwargs,
    )


@functools.cache
def delegate_class(base: type) -> type:
    """A subclass of a family's processor whose attention call is ours.

    Its `__call__` is the family's code with the family's globals, but `dispatch_attention_fn` is `attend` and the
    attribute `_attention_backend` is read as `vidsparse_layer`, which is how `attend` learns the layer. The code object
    is shared by all layers, so torch.compile sees one function; diffusers still reads and writes the real
    `_attention_backend`.

    Raises:
        UnsupportedModelError: the processor does not call `dispatch_attention_fn` with its own backend.
    """
    call: Any = vars(base).get("__call__") or base.__call__
    code = getattr(call, "__code__", None)
    if code is None or not {"dispatch_attention_fn", "_attention_backend"} <= set(code.co_names):
        raise UnsupportedModelError(
            f"{base.__name__} does not compute attention through `dispatch_attention_fn`; reset the model's attention "
            "processors before setting a vidsparse one."
        )
    names = tuple("vidsparse_layer" if name == "_attention_backend" else name for name in code.co_names)
    function = types.FunctionType(
        code.replace(co_names=names),
        {**call.__globals__, "dispatch_attention_fn": attend},
        call.__name__,
        call.__defaults__,
        call.__closure__,
    )
    function.__kwdefaults__ = call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    return type(f"Sparse{base.__name__}", (LayerProcessor, base), {"__call__": function, "__doc__": base.__doc__})


def make_layer(original: Any, *, index: int, name: str, strict: bool) -> Any:
    """A layer processor that takes over the attributes of the processor it stands in for."""
    layer = _restore(type(original), dict(vars(original)))
    layer.layer_index, layer.layer_name, layer.strict = index, name, strict
    layer.sparse, layer.called, layer.late_reason = False, False, None
    layer.context, layer.recent = None, {}
    layer._attention_backend = getattr(original, "_attention_backend", None)
    layer._parallel_config = getattr(original, "_parallel_config", None)
    return layer


def _restore(base: type, state: dict[str, Any]) -> Any:
    cls = delegate_class(base)
    layer: Any = object.__new__(cls)
    layer.__dict__.update(state)
    return layer
