"""The per-layer processor: the family's own `__call__` with only its attention call replaced."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from vidsparse.attention import attend, in_autocast, over_blocks
from vidsparse.errors import DenseFallbackError, UnboundProcessorError, UnsupportedModelError
from vidsparse.guard import measure
from vidsparse.processors.context import AttentionContext
from vidsparse.processors.dense_calls import KERNEL, STOCK_DENSE
from vidsparse.processors.families import Family
from vidsparse.processors.fused import fused_form
from vidsparse.processors.parallel import attend_over_ranks, note_loads

ATTENTION_MASK = "attention mask that is not one per key"
MASKED_VIDEO = "video tokens masked, which a correction for dropped blocks does not see"
CAUSAL = "causal attention asked for"
DROPOUT = "attention dropout asked for"
LENGTH = "a number of tokens that the model's input does not explain"

ATTENTION_CALLS = {
    "dispatch_attention_fn": "attend",
    "F.scaled_dot_product_attention": "attend_heads_first",
}
"""How the families call attention, and the method of `LayerProcessor` that takes its place."""


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
    lengths: dict[int, AttentionContext]
    called: bool
    biased: bool
    fuses: bool
    late_reason: str | None
    dense_runs: str | None
    recent: dict[int, AttentionContext]
    selected: tuple[str, str, Any] | None
    guarded: bool
    measured: list[torch.Tensor]
    device_type: str
    key_mask: Callable[[torch.Tensor], torch.Tensor] | None
    pairwise_mask: bool
    per_sample: bool
    handle: torch.Tensor
    _attention_backend: Any
    _parallel_config: Any

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time: name the family's class instead.
        base = type(self).__mro__[2]
        return _restore, (base, {name: value for name, value in vars(self).items() if name != "handle"})

    def attend(
        self,
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
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Attention of this layer on `[batch, seq_len, num_heads, head_dim]`, sparse or dense as the context says.

        Stands where the family calls `dispatch_attention_fn`, with its arguments.
        """
        context = self._context_of(query, key, attn_mask, is_causal, dropout_p)
        if context is not None and context.parts is not None:
            return self._attend_masked(query, key, value, context, attn_mask, scale)
        plain = not (attn_mask is not None or dropout_p or is_causal or attention_kwargs or backend or parallel_config)
        out = self._attend_every_block(query, key, value, context, plain, enable_gqa, scale)
        if out is not None:
            return out
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            attention_kwargs=attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    def attend_heads_first(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Likewise on `[batch, num_heads, seq_len, head_dim]`, in place of torch's `scaled_dot_product_attention`."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        context = self._context_of(q, k, attn_mask, is_causal, dropout_p)
        if context is not None and context.parts is not None:
            return self._attend_masked(q, k, v, context, attn_mask, scale).transpose(1, 2)
        plain = not (attn_mask is not None or dropout_p or is_causal)
        out = self._attend_every_block(q, k, v, context, plain, enable_gqa, scale)
        if out is not None:
            return out.transpose(1, 2)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def _attend_every_block(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext | None,
        plain: bool,
        enable_gqa: bool,
        scale: float | None,
    ) -> torch.Tensor | None:
        """A dense call through our kernel, or None where the model's own attention is to run.

        Args:
            query, key, value: `[batch, seq_len, num_heads, head_dim]`.
            context: of the call.
            plain: nothing but query, key, value and scale was given.
            enable_gqa: whether key and value may have fewer heads than query.
            scale: factor on query . key.
        """
        if context is None or context.every_block is None:
            return None
        inputs = in_autocast(query, key, value)
        # In a compiled forward the length of one sample's tokens is no number yet.
        unknown = self.per_sample and torch.compiler.is_compiling()
        if unknown or not plain or not context.every_block.fits(*inputs, enable_gqa):
            self.dense_runs = STOCK_DENSE
            return None
        # Where one call of a layer is the model's own, the report does not say that all were ours.
        self.dense_runs = self.dense_runs or KERNEL
        return over_blocks(*inputs, context.every_block.mask, None, scale, KERNEL)

    def _attend_masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        attn_mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        out = self._attend_sparse(query, key, value, context, _key_bias(self._over_keys(attn_mask)), scale)
        if not self.pairwise_mask or attn_mask is None or attn_mask.ndim != 4:
            return out
        # The text's own rows of the mask; they are few.
        text_len = context.layout.text_before
        q, k, v = (x.transpose(1, 2) for x in (query[:, :text_len], key, value))
        text = F.scaled_dot_product_attention(q, k, v, attn_mask[:, :, :text_len], scale=scale)
        return torch.cat([text.transpose(1, 2), out[:, text_len:]], dim=1)

    def _over_keys(self, attn_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask that the video's rows have, as far as the family says that they all have one."""
        if attn_mask is None:
            return None
        if self.pairwise_mask and attn_mask.ndim == 4:
            return attn_mask[:, :, -1:]
        return attn_mask if self.key_mask is None else self.key_mask(attn_mask)

    def _attend_sparse(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        key_bias: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        if context.shards is None:
            return self._attend_here(query, key, value, context, key_bias, scale)

        def attend_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:
            return self._attend_here(q, k, v, context, bias, scale)

        return attend_over_ranks(attend_heads, query, key, value, key_bias, context.shards)

    def _attend_here(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        key_bias: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Sparse attention over the whole sequence, in the heads of this device."""
        selects = context.parts is not None and not context.parts.is_static
        if torch.compiler.is_compiling() and (selects or self.guarded or self._finds_length_at_run_time()):
            # What selects from query and key keeps state between steps: one opaque call in the graph. So does the guard.
            return _attend_layer(query, key, value, key_bias, self.handle, scale)
        out, selection = attend(query, key, value, context, key_bias=key_bias, scale=scale)
        self.device_type = query.device.type
        note_loads(context.memory, selection, context.shards)
        if selection is not None and selection.backend is not None:
            # Not the selection itself, which would keep the lists of all layers until the next forward.
            self.selected = (*selection.backend, 1.0 if selection.exact else selection.density)
        if context.guarded and not torch.compiler.is_compiling():
            found = measure(query, key, value, out, context, key_bias, scale)
            if found is not None:
                self.measured.append(found)
        return out

    def _finds_length_at_run_time(self) -> bool:
        """In a compiled forward the length of a prompt without its padding is no number yet. Not for training."""
        return bool(self.lengths) and torch.compiler.is_compiling() and not torch.is_grad_enabled()

    def _context_of(
        self, query: torch.Tensor, key: torch.Tensor, attn_mask: Any, is_causal: bool, dropout_p: float
    ) -> AttentionContext | None:
        """The context of a call, without parts where it is dense; None where it is none of ours or cannot be sparse.

        Query and key are `[batch, seq_len, ...]`.
        """
        context, sparse = self.context, self.sparse
        if self.lengths and not self._finds_length_at_run_time():
            # Some families drop the padding of each sample's prompt, so one forward makes calls of several lengths.
            context = self.lengths.get(query.shape[1], context)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Gradient checkpointing replays this layer inside a backward pass; other forwards may have run since.
            context = self.recent.get(query.shape[1], context)
            sparse = context is not None and context.parts is not None
        if context is None:
            raise UnboundProcessorError(
                "A vidsparse layer processor was called outside its model's forward; set a processor on the whole "
                "transformer with `set_attn_processor`, and do not reuse processors read from another model."
            )
        if key.shape[1] != query.shape[1]:
            # A second attention of the same module, over image or adapter tokens: always exact, never counted.
            return None
        obstacle = _obstacle(self._over_keys(attn_mask), is_causal, dropout_p) if sparse else None
        if (
            sparse
            and attn_mask is not None
            and self.key_mask is not None
            and context.parts
            and context.parts.correction
        ):
            obstacle = MASKED_VIDEO
        if sparse and not torch.compiler.is_compiling() and query.shape[1] != context.num_tokens:
            obstacle = LENGTH
        if obstacle is not None:
            # Dense attention is exact for all of these.
            if self.strict:
                raise DenseFallbackError(
                    f"Layer {self.layer_name} would run dense ({obstacle}), because sparse attention cannot do that; "
                    "call the model without it or turn off `strict`."
                )
            self.late_reason = obstacle
            context = None
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            # Not inside a compiled checkpoint, where nothing outside may be written.
            self.called = True
            self.biased = attn_mask is not None
        return context


def _obstacle(attn_mask: torch.Tensor | None, is_causal: bool, dropout_p: float) -> str | None:
    """What in a call the sparse path cannot do, or None."""
    if attn_mask is not None and not (attn_mask.ndim == 2 or (attn_mask.ndim == 4 and attn_mask.shape[1:3] == (1, 1))):
        return ATTENTION_MASK
    if is_causal:
        return CAUSAL
    return DROPOUT if dropout_p else None


def _key_bias(attn_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask over keys, `[batch, seq_len]` or `[batch, 1, 1, seq_len]`, as an fp32 bias `[batch, 1, seq_len]`."""
    if attn_mask is None:
        return None
    attn_mask = attn_mask.reshape(attn_mask.shape[0], 1, attn_mask.shape[-1])
    if attn_mask.dtype != torch.bool:
        return attn_mask.float()
    return torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill(~attn_mask, -torch.inf)


@functools.cache
def delegate_class(base: type) -> type:
    """A subclass of a family's processor whose attention call is ours.

    Its `__call__` is compiled from the family's source with the family's globals, and each attention call in it (see
    `ATTENTION_CALLS`) is a call of the layer's own method. The code object is shared by all layers, so torch.compile
    sees one function, and tracebacks point into the family's file. Where there is a fused form of that code, it is asked
    first.

    Raises:
        UnsupportedModelError: the processor makes no such call, or its source cannot be read.
    """
    call: Any = vars(base).get("__call__") or base.__call__
    function = _with_our_attention(call) if isinstance(call, types.FunctionType) else None
    if function is None:
        raise UnsupportedModelError(
            f"{base.__name__} makes no attention call that vidsparse knows ({' or '.join(ATTENTION_CALLS)}); reset "
            "the model's attention processors before setting a vidsparse one."
        )
    members = {"__call__": function, "fused": fused_form(call), "__doc__": base.__doc__}
    cls = type(f"Sparse{base.__name__}", (LayerProcessor, base), members)
    _tell_guiders(cls, base)
    return cls


def _tell_guiders(cls: type, base: type) -> None:
    """Let diffusers' layer skipping, which looks processors up by class, find what it knows of the family's."""
    from diffusers.hooks import _helpers

    registry = _helpers.AttentionProcessorRegistry
    try:
        registry.register(cls, registry.get(base))
    except ValueError:
        pass  # Not known for the family's either.


def _with_our_attention(call: types.FunctionType) -> Callable[..., Any] | None:
    """`call` with its attention calls replaced, or None where there is none or it cannot be rewritten."""
    try:
        lines, first_line = inspect.getsourcelines(call)
        path = inspect.getsourcefile(call)
    except (OSError, TypeError):
        return None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    # A decorator or a closure would not survive being compiled anew.
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or call.__closure__:
        return None
    replace = _ReplaceAttention(definition.args.args[0].arg)
    tree = replace.visit(tree)
    if not replace.found:
        return None
    if fused_form(call) is not None:
        definition.body[:0] = _ask_fused(definition)
    ast.increment_lineno(tree, first_line - 1)
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), path or "<processor>", "exec"), call.__globals__, names)
    function = names[call.__name__]
    function.__defaults__, function.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    return function


def _ask_fused(definition: ast.FunctionDef) -> list[ast.stmt]:
    """Return what `self.fused` makes of the arguments, unless it declines."""
    processor, *arguments = (argument.arg for argument in definition.args.args)
    code = f"_fused = {processor}.fused({', '.join(arguments)})\nif _fused is not None:\n    return _fused"
    statements = ast.parse(code).body
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, definition.body[0])
    return statements


class _ReplaceAttention(ast.NodeTransformer):
    def __init__(self, processor: str) -> None:
        self.processor, self.found = processor, False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = ATTENTION_CALLS.get(ast.unparse(node.func))
        if method is not None:
            self.found = True
            node.func = ast.copy_location(
                ast.Attribute(ast.Name(self.processor, ast.Load()), method, ast.Load()), node.func
            )
        return node


def make_layer(original: Any, family: Family, *, index: int, name: str, strict: bool) -> Any:
    """A layer processor that takes over the attributes of the processor it stands in for."""
    layer = _restore(family.processor_class(type(original)), dict(vars(original)))
    layer.layer_index, layer.layer_name, layer.strict = index, name, strict
    layer.sparse, layer.called, layer.biased, layer.late_reason = False, False, False, None
    layer.fuses, layer.dense_runs = False, None
    layer.context, layer.lengths, layer.recent, layer.selected = None, {}, {}, None
    layer.guarded, layer.measured = False, []
    layer.device_type = "cpu"
    layer.key_mask, layer.pairwise_mask = family.key_mask, family.pairwise_mask
    layer.per_sample = family.per_sample
    layer._attention_backend = getattr(original, "_attention_backend", None)
    if hasattr(original, "_parallel_config"):
        # diffusers hands its config to processors that have the attribute.
        layer._parallel_config = original._parallel_config
    return layer


def _restore(base: type, state: dict[str, Any]) -> Any:
    cls = delegate_class(base)
    layer: Any = object.__new__(cls)
    layer.__dict__.update(state)
    layer.handle = torch.tensor(next(_HANDLES), device="cpu")
    _LAYERS[int(layer.handle)] = layer
    return layer


_HANDLES = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, LayerProcessor] = weakref.WeakValueDictionary()
"""Living layers by handle. A handle is a tensor, so that one compiled graph serves all layers of a model."""


@torch.library.custom_op("vidsparse::attend_layer", mutates_args=())
def _attend_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    layer = _LAYERS[int(handle)]
    context = layer.lengths.get(query.shape[1], layer.context)
    assert context is not None
    return layer._attend_here(query, key, value, context, key_bias, scale).contiguous()


def _no_backward(ctx: Any, grad: torch.Tensor) -> None:
    raise DenseFallbackError(
        "Methods that select from query and key cannot be trained under torch.compile; train without it, or with a static "
        "method such as radial."
    )


_attend_layer.register_autograd(_no_backward)


@_attend_layer.register_fake
def _attend_layer_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)
