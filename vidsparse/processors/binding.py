"""Binding a processor to a transformer: layers, grid, step and branch, and how all of it is undone.

A bound model carries a forward pre-hook and a forward hook of torch, one light processor per video self-attention, and
an instance attribute over `cache_context`. Torch's hooks run outside the wrappers that offload, context parallelism and
caches put around `module.forward`, so they see whole inputs, and removing them leaves those wrappers as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vidsparse.break_even import CallShape
from vidsparse.errors import DenseFallbackError, UnsupportedModelError
from vidsparse.guard import LEVELS, is_denser
from vidsparse.layout import TokenLayout
from vidsparse.parts import Parts, check_reuse, size_in_words
from vidsparse.processors.base import SparseProcessor
from vidsparse.processors.context import MAX_MASKS, AttentionContext, RunState
from vidsparse.processors.dense_calls import (
    CHOSEN,
    GRADIENTS,
    OF_THE_CALL,
    ON_KERNEL,
    PARALLEL,
    STOCK_DENSE,
    SWITCHED_OFF,
    EveryBlock,
    choose_dense,
)
from vidsparse.processors.families import FAMILIES, Family, family_of, supported_models
from vidsparse.processors.parallel import Shards, deal_heads, make_shards, may_deal, mean_over_ranks, refusal
from vidsparse.report import Raised, Row
from vidsparse.schedule import ASKED_FOR, GUARDED, METHOD_DENSE, UNKNOWN_STEP

FAST_ON_CUDA = frozenset({"triton", "hopper", "hopper_with_tail", "flash4", "flex"})
SCORES_SKIPPED = "attention scores skipped by perturbed-attention guidance"
BINDING = "_vidsparse_binding"
STOCK = "vidsparse_stock"
PROJECTION = "proj_l"
"""Name of a layer's projection for the linear branch, as in the public SLA and TurboDiffusion checkpoints."""
REPLACE_PROCESSORS = ("fuse_qkv_projections", "unfuse_qkv_projections")
"""Methods of a model after which some families have other processors (CogVideoX, Stable Diffusion 3)."""


def install() -> None:
    """Teach `set_attn_processor` of diffusers to bind vidsparse processors; anything else passes through unchanged.

    Runs when the first processor is made, and once. `model.set_attn_processor(RadialProcessor())` looks the method up
    before it makes the processor, so the function that is already in the caller's hands must change: its code is
    replaced, and the code from before kept as a function of its own.
    """
    import diffusers
    from diffusers.models.attention import AttentionMixin

    function: Any = AttentionMixin.set_attn_processor
    if hasattr(function, STOCK):
        return
    stock = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    setattr(function, STOCK, stock)
    function.__code__ = _pass_through.__code__
    for name in supported_models():
        # Transformers without the mixin get the method too; there is nothing of theirs to pass through to.
        cls = getattr(diffusers, name, None)
        if cls is not None and not hasattr(cls, "set_attn_processor"):
            cls.set_attn_processor = _set_attn_processor


def _pass_through(self: Any, processor: Any) -> None:
    # Runs with the globals of diffusers.
    from vidsparse.processors.binding import set_attn_processor

    set_attn_processor(self, processor)


def set_attn_processor(model: Any, processor: Any) -> None:
    """Bind a vidsparse processor; hand anything else to diffusers' own code."""
    from diffusers.models.attention import AttentionMixin

    if isinstance(processor, SparseProcessor):
        bind(processor, model)
        return
    _make_way(model, processor)
    getattr(AttentionMixin.set_attn_processor, STOCK)(model, processor)


def _make_way(model: Any, processor: Any) -> None:
    """Unbind for other processors, but not for `model.set_attn_processor(model.attn_processors)`, which changes nothing."""
    binding = vars(model).get(BINDING)
    if not (binding is not None and isinstance(processor, dict) and binding.owns_any(processor.values())):
        unbind(model)


def _set_attn_processor(self: Any, processor: Any) -> None:
    """`set_attn_processor` for transformers that diffusers gives none.

    Args:
        processor: a vidsparse processor, to bind; or one processor for every attention module; or a dict of processors
            by module path, each with the ending ".processor".

    Raises:
        ValueError: a dict does not name every attention module.
    """
    if isinstance(processor, SparseProcessor):
        bind(processor, self)
        return
    _make_way(self, processor)
    modules = {f"{name}.processor": module for name, module in self.named_modules() if hasattr(module, "processor")}
    if isinstance(processor, dict) and processor.keys() != modules.keys():
        raise ValueError(
            f"A dict of processors must name each of the model's {len(modules)} attention modules, got {len(processor)}."
        )
    for name, module in modules.items():
        _put(module, processor[name] if isinstance(processor, dict) else processor)


def bind(processor: SparseProcessor, model: Any, *, run: RunState | None = None, label: str = "") -> Binding:
    """Attach a processor to a transformer in place of whatever vidsparse processor it had.

    Args:
        processor: method and settings.
        model: a transformer of a supported family.
        run: state to share with another transformer of the same generation; default its own.
        label: put before the layer names in the report.

    Raises:
        UnsupportedModelError: the family is unknown or the model's processors are not the family's own.
    """
    family = check_model(model)
    binding = Binding(processor, family, run or RunState(), f"{label}." if label else "")
    earlier = vars(model).get(BINDING)
    if earlier is not None:
        earlier.detach(model, keep_projections=processor.has_projection)
        binding.projections = earlier.projections if processor.has_projection else set()
    binding.attach(model)
    processor.watch(binding.run)
    return binding


def check_model(model: Any) -> Family:
    """The family of a model that `bind` can take; changes nothing, so a refusal leaves an earlier binding working.

    Raises:
        UnsupportedModelError: as for `bind`.
    """
    from vidsparse.processors.delegate import LayerProcessor, delegate_class

    family, binding = family_of(model), vars(model).get(BINDING)
    targets = _targets(model, family)
    if not targets:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no softmax self-attention over its video or image that vidsparse could take."
        )
    for name, module in targets:
        if binding is not None and binding.owns_any([module.processor]):
            continue
        if isinstance(module.processor, LayerProcessor):
            raise UnsupportedModelError(
                f"{name} holds a layer processor of another binding; set the family's own processors first."
            )
        delegate_class(family.processor_class(type(module.processor)))
    return family


def _targets(model: Any, family: Family) -> list[tuple[str, Any]]:
    """Paths and modules of the self-attention over video or image tokens, in the order of the model."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "processor") and family.is_target(name, module)
    ]


def _put(module: Any, processor: Any) -> None:
    # Mochi's attention module has the attribute but not the method.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def unbind(model: Any) -> None:
    """Undo `bind`: the processors from before are back, and nothing of vidsparse is left on the model."""
    binding = vars(model).get(BINDING)
    if binding is not None:
        binding.detach(model)


@dataclass
class _Forward:
    """What one forward of the model does in all its sparse layers.

    Attributes:
        layouts: of its calls, the longest first; most families have one.
        batch: samples of one call.
        shards: for each layout this rank's share under context parallelism, or None.
        parts: for each layout what the method does; empty while no layer is sparse.
        backend: name and reason for static masks; "auto" is settled at the call of a method that selects.
        bias_backend: likewise for calls with a mask over keys.
        density: of a static mask.
        keeps: whether layers may keep things for later steps.
        device: of the sparse calls.
        every_block: for each layout what dense calls run on, None: the model's own attention.
        dense_reason: why.
        dense_cost: estimated time of a dense call over that of the model's own attention.
    """

    layouts: list[TokenLayout]
    batch: int
    shards: list[Shards | None] = field(init=False)
    parts: list[Parts] = field(default_factory=list)
    backend: tuple[str, str | None] = ("auto", None)
    bias_backend: tuple[str, str | None] = ("auto", None)
    density: float = 1.0
    keeps: bool = False
    device: Any = None
    every_block: Sequence[EveryBlock | None] = ()
    dense_reason: str | None = None
    dense_cost: float = 1.0

    def __post_init__(self) -> None:
        self.shards = [None] * len(self.layouts)
        self.every_block = self.every_block or [None] * len(self.layouts)


class Binding:
    """One processor on one transformer."""

    def __init__(self, processor: SparseProcessor, family: Family, run: RunState, prefix: str) -> None:
        self.processor, self.family, self.run, self.prefix = processor, family, run, prefix
        self.layers: list[Any] = []
        self.saved: dict[str, Any] = {}
        self.projections: set[str] = set()
        self._handles: list[Any] = []
        self._parameters: tuple[str, ...] = ()
        self._rows: list[Row] = []
        self._bias_backends: list[tuple[str, str | None]] = []
        self.outside_graph = False

    def __getstate__(self) -> dict[str, Any]:
        # A family holds functions that do not pickle; there is one of each.
        return vars(self) | {"family": self.family.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.family = next(family for family in FAMILIES if family.name == state["family"])

    def owns_any(self, processors: Iterable[Any]) -> bool:
        """Whether one of these is a layer processor of this binding."""
        return any(processor is layer for processor in processors for layer in self.layers)

    def attach(self, model: Any) -> None:
        from vidsparse.processors.delegate import make_layer

        self.saved = {name: module.processor for name, module in _targets(model, self.family)}
        self.layers = [
            make_layer(original, self.family, index=index, name=self.prefix + name, strict=self.processor.strict)
            for index, (name, original) in enumerate(self.saved.items())
        ]
        if self.processor.has_projection:
            missing = [name for name in self.saved if not hasattr(model.get_submodule(name), PROJECTION)]
            made = [_zero_projection(model.get_submodule(name)) for name in missing]
            for name, projection in zip(missing, made, strict=True):
                model.get_submodule(name).add_module(PROJECTION, projection)
            self.projections |= set(missing)
        for name, layer in zip(self.saved, self.layers, strict=True):
            _put(model.get_submodule(name), layer)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._handles = [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_After(self)),
        ]
        if hasattr(type(model), "cache_context"):
            model.cache_context = _CacheContext(model, self.run, vars(model).get("cache_context"))
        for method in REPLACE_PROCESSORS:
            if hasattr(type(model), method):
                setattr(model, method, _Rebind(model, self, method))
        model.compile = _Compile(model, self)
        if model._compiled_call_impl is not None:
            model._compiled_call_impl = _AroundGraph(model, self, model._compiled_call_impl)
        setattr(model, BINDING, self)

    def detach(self, model: Any, keep_projections: bool = False) -> None:
        """Take everything off again, but for projections that a next binding will use."""
        for name, layer in zip(self.saved, self.layers, strict=True):
            module = model.get_submodule(name)
            # What the user set in between stays.
            if module.processor is layer:
                original = self.saved[name]
                for choice in ("_attention_backend", "_parallel_config"):
                    if hasattr(original, choice):
                        _carry(choice, layer, original)
                _put(module, original)
            layer.context = None
            layer.lengths.clear()
            layer.recent.clear()
            if name in self.projections and not keep_projections and hasattr(module, PROJECTION):
                delattr(module, PROJECTION)
        self.run.forget()
        for handle in self._handles:
            handle.remove()
        context = vars(model).get("cache_context")
        # One that somebody put over ours stays; what was there before ours comes back.
        if isinstance(context, _CacheContext):
            del model.cache_context
            if context.earlier is not None:
                model.cache_context = context.earlier
        for attribute in ("compile", *REPLACE_PROCESSORS, BINDING):
            if isinstance(vars(model).get(attribute), _Compile | _Rebind | Binding):
                vars(model).pop(attribute)
        if isinstance(model._compiled_call_impl, _AroundGraph):
            model._compiled_call_impl = model._compiled_call_impl.compiled

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide for each layer of this forward whether it is sparse and why not, and hand it its context.

        Raises:
            DenseFallbackError: under `strict`, a layer would run dense, or on a slow backend, without being asked to.
            ConfigError: the grid or the device's memory is too small for what was asked.
        """
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        if self.family.hidden_states not in arguments:
            return  # The model's own error says what is missing.
        latents = arguments[self.family.hidden_states]
        hidden_states = _first_tensor(latents)
        training = torch.is_grad_enabled() and model.training
        self.run.start_forward(self._timestep(arguments), training)
        batch = len(latents) if isinstance(latents, list | tuple) else hidden_states.shape[0]
        forward = _Forward(self._layouts(arguments, model.config), 1 if self.family.per_sample else batch)
        self._choose_dense(forward, model, arguments, hidden_states)
        check_reuse(self.processor.recipe.schedule.reuse_gib, hidden_states.device)
        self.processor.check(forward.layouts[0].grid)
        seq_len = forward.layouts[0].seq_len
        obstacle = self.family.obstacle(arguments, model.config)
        reasons = [self._dense_reason(layer, seq_len, training) or obstacle for layer in self.layers]
        skipping = {n for n, path in enumerate(self.saved) if _skips_scores(model.get_submodule(path))}
        for index in range(len(self.layers)):
            if reasons[index] is None and index in skipping:
                reasons[index] = SCORES_SKIPPED
        refused = self._share_out(forward, model, hidden_states.device)
        reasons = [refused if reason is None else reason for reason in reasons]
        if self.processor.strict:
            self._check_strict(reasons, seq_len)
        target = self._guard_target()
        guarded = target is not None
        short = {} if target is None else self.run.guard.decide(self.run.step or 0, target)
        levels = [self.run.guard.level(layer.layer_name) if guarded else 0 for layer in self.layers]
        forwards = {0: forward}
        for level in sorted({of for of, reason in zip(levels, reasons, strict=True) if reason is None}):
            slow = self._prepare_level(level, forwards, model, arguments, hidden_states)
            pairs = zip(levels, reasons, strict=True)
            reasons = [slow if reason is None and of == level else reason for of, reason in pairs]
            if self.processor.strict:
                self._check_strict(reasons, seq_len, slow)
        sparse = [forwards[of] for of, reason in zip(levels, reasons, strict=True) if reason is None]
        self._deal_heads([layer for layer, reason in zip(self.layers, reasons, strict=True) if reason is None], sparse)
        self._rows, self._bias_backends = [], []
        for path, layer, reason, level in zip(self.saved, self.layers, reasons, levels, strict=True):
            projection = getattr(model.get_submodule(path), PROJECTION, None)
            mine = forwards.get(level, forward)
            self._hand_out(mine, layer, reason, projection, guarded, layer.layer_index in skipping)
            if layer.layer_name in short:
                self._tell_raised(layer, mine, reason, short[layer.layer_name])

    def _deal_heads(self, layers: list[Any], forwards: list[_Forward]) -> None:
        """Share the heads of layers between ranks by what they computed, once in a generation, when they select anew."""
        schedule, memories = self.processor.recipe.schedule, []
        for layer, forward in zip(layers, forwards, strict=True):
            if forward.keeps and may_deal(forward.parts[0], forward.shards[0]):
                memory = self.run.memory(layer.layer_name, schedule.reuse_gib)
                if self.run.step is not None and memory.selects_anew(self.run.step, schedule.refresh_every):
                    memories.append(memory)
        if memories and forwards[0].shards[0] is not None:
            deal_heads(memories, forwards[0].shards[0])

    def _guard_target(self) -> float | None:
        """The agreement with exact attention that is asked of this forward; none in training."""
        target = self.processor.recipe.schedule.guard
        if target is None or self.run.step is None or self.processor.always_dense:
            return None
        self.run.report.guard = target
        if torch.is_grad_enabled():
            self.run.report.note("the guard does not run where gradients are recorded")
            return None
        return target

    def _prepare_level(
        self, level: int, forwards: dict[int, _Forward], model: Any, arguments: dict[str, Any], hidden_states: Any
    ) -> str | None:
        """`_prepare` for layers that the guard raised `level` times; a reason where they run dense."""
        forward = forwards[0]
        if level == 0:
            return self._prepare(forward, self.processor, model, arguments, hidden_states)
        layouts, where = forward.layouts, (hidden_states.device, LEVELS * len(forward.layouts))
        parts = self.run.parts_of(self.processor, layouts[0], *where)
        processor = self.run.guard.denser(self.processor, parts, level, layouts[0])
        if processor is None:
            return GUARDED
        if not is_denser(self.run.parts_of(processor, layouts[0], *where, quiet=True), parts, level):
            return GUARDED
        forwards[level] = _Forward(
            layouts,
            forward.batch,
            every_block=forward.every_block,
            dense_reason=forward.dense_reason,
            dense_cost=forward.dense_cost,
        )
        forwards[level].shards = forward.shards
        slow = self._prepare(forwards[level], processor, model, arguments, hidden_states)
        return GUARDED if slow is not None else None

    def _tell_raised(self, layer: Any, forward: _Forward, reason: str | None, agreement: float) -> None:
        """Note what the guard did to a layer, and let the layer start anew."""
        self.run.forget_layer(layer.layer_name)
        if reason is None:
            density = forward.density if forward.parts[0].is_static else forward.parts[0].density
            action = "attends more" if density is None else f"density {density:.2f}"
        elif reason == GUARDED:
            action = "dense"
        else:
            return
        self.run.report.raised.append(Raised(layer.layer_index, layer.layer_name, self.run.step, agreement, action))

    def _share_out(self, forward: _Forward, model: Any, device: torch.device) -> str | None:
        """Settle what each rank of context parallelism computes; a reason to run dense where that cannot be."""
        config = getattr(self.layers[0], "_parallel_config", None)
        refused = refusal(config, model, forward.layouts[0])
        if config is not None and refused is None:
            num_heads, _ = self.heads(model)
            forward.shards = [make_shards(config, model, each, num_heads, device) for each in forward.layouts]
        return refused

    def _prepare(
        self, forward: _Forward, processor: SparseProcessor, model: Any, arguments: dict[str, Any], hidden_states: Any
    ) -> str | None:
        """Build or find the method's parts and its backends; a reason to run dense where that is faster."""
        device, grad = hidden_states.device, torch.is_grad_enabled()
        forward.device = device
        count = len(forward.layouts) * (1 if processor.recipe.schedule.guard is None else LEVELS)
        quiet = processor is not self.processor
        forward.parts = [
            parts if shards is None else shards.of_this_rank(parts)
            for parts, shards in zip(
                (self.run.parts_of(processor, each, device, count, quiet) for each in forward.layouts),
                forward.shards,
                strict=True,
            )
        ]
        first, mask = forward.parts[0], forward.parts[0].block_mask
        tensors = (x for x in arguments.values() if isinstance(x, torch.Tensor))
        needs_grad = grad and any(x.requires_grad for x in (*tensors, *model.parameters()))
        if first.is_static and mask is not None:
            forward.density = mask.density
            if needs_grad:
                from vidsparse.ops import keep_transposed_lists

                keep_transposed_lists(mask)
            heads = forward.shards[0].local_heads if forward.shards[0] is not None else None
            select = functools.partial(self._select_backend, model, hidden_states, mask, needs_grad, heads)
            forward.backend = select()
            if forward.layouts[0].text_len or self.family.key_mask is not None:
                forward.bias_backend = select(bias=True)
        # Training keeps nothing: a replay would see what its own forward left. Nor may samples of one batch meet.
        alone = not self.family.per_sample or hidden_states.shape[0] == 1
        forward.keeps = alone and not needs_grad and self.run.may_keep(model.training)
        if not alone and not first.is_static:
            self.run.report.note(f"{self.family.name} attends sample by sample: nothing is kept from step to step")
        if needs_grad:
            return None
        shape = self.call_shape(model, forward.batch, forward.layouts[0].seq_len)
        return processor.slow_reason(first, shape, device.type, _compute_dtype(hidden_states), forward.dense_cost)

    def _choose_dense(self, forward: _Forward, model: Any, arguments: dict[str, Any], hidden_states: Any) -> None:
        """Settle what the dense calls of a forward run on."""
        if self.processor.recipe.schedule.dense_backend == "stock":
            forward.dense_reason = SWITCHED_OFF
        elif torch.is_grad_enabled():
            forward.dense_reason = GRADIENTS
        elif getattr(self.layers[0], "_parallel_config", None) is not None:
            forward.dense_reason = PARALLEL
        elif self.layers[0]._attention_backend is not None:
            forward.dense_reason = CHOSEN
        else:
            dtype, device = _compute_dtype(hidden_states), hidden_states.device
            shapes = [self.call_shape(model, forward.batch, layout.seq_len) for layout in forward.layouts]
            chosen = [choose_dense(shape, dtype, device) for shape in shapes]
            forward.dense_reason = chosen[0].reason
            # A mask over text that stands among the video's tokens reaches attention, and our kernel for dense calls takes
            # none. Where text has an attention of its own, its mask does not matter here.
            may_be = forward.layouts[0].text_len > 0 or self.family.key_mask is not None
            masked = may_be and any("mask" in name and x is not None for name, x in arguments.items())
            forward.dense_cost = 1.0 if masked else chosen[0].cost
            forward.every_block = [each.blocks for each in chosen]

    def _hand_out(
        self,
        forward: _Forward,
        layer: Any,
        reason: str | None,
        projection: Any,
        guarded: bool = False,
        skips_scores: bool = False,
    ) -> None:
        """Give a layer its contexts for this forward, and note its row for the report."""
        run, schedule, sparse = self.run, self.processor.recipe.schedule, reason is None
        parts = forward.parts if sparse else [None] * len(forward.layouts)
        keeps = forward.keeps and parts[0] is not None and not parts[0].is_static
        memory = run.memory(layer.layer_name, schedule.reuse_gib) if keeps else None
        # What makes a module return its values reaches torch's own attention alone.
        replaces = not sparse and not skips_scores
        every_block = forward.every_block if replaces else [None] * len(forward.layouts)
        each_call = [
            AttentionContext(
                layer_index=layer.layer_index,
                layer_count=len(self.layers),
                step_index=run.step,
                step_count=run.num_steps,
                branch=run.branch,
                layout=layout,
                parts=each,
                memory=memory,
                projection=projection,
                refresh_every=schedule.refresh_every,
                backend=forward.backend[0] if sparse else "auto",
                bias_backend=forward.bias_backend[0] if sparse else "auto",
                shards=self._dealt(shards, forward, each, memory),
                guarded=guarded and sparse,
                every_block=blocks,
            )
            for layout, each, shards, blocks in zip(forward.layouts, parts, forward.shards, every_block, strict=True)
        ]
        contexts = {context.num_tokens: context for context in each_call}
        layer.context = each_call[0]
        layer.lengths = contexts if len(contexts) > 1 else {}
        layer.sparse, layer.called, layer.biased, layer.late_reason = sparse, False, False, None
        layer.selected, layer.guarded, layer.measured = None, guarded and sparse, []
        layer.dense_runs = None
        if torch.is_grad_enabled():
            # For a replay inside the backward pass; a forward without gradients, of a teacher for instance, has none.
            layer.recent |= contexts
            while len(layer.recent) > MAX_MASKS * len(contexts):
                layer.recent.pop(next(iter(layer.recent)))
        self._bias_backends.append(forward.bias_backend)
        self._rows.append(
            Row(
                layer=layer.layer_index,
                name=layer.layer_name,
                step=run.step,
                branch=run.branch,
                backend=forward.backend[0] if sparse else "dense",
                density=forward.density if sparse else 1.0,
                tokens=forward.layouts[0].seq_len,
                reason=reason,
                backend_reason=forward.backend[1] if sparse else None if skips_scores else forward.dense_reason,
            )
        )

    def after(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        shards = self.layers[0].context.shards if self.layers[0].context is not None else None
        measured = self.run.guard.collect(
            ((layer.layer_name, layer.measured) for layer in self.layers if layer.called),
            None if shards is None else shards.group,
        )
        if shards is not None:
            self._join_densities(shards)
        for layer, row, bias_backend in zip(self.layers, self._rows, self._bias_backends, strict=False):
            if not layer.called:
                continue
            if layer.guarded and layer.late_reason is None:
                row = replace(row, agreement=measured.get(layer.layer_name))
                if row.agreement is None:
                    self.run.report.note("the guard sees nothing of calls that a CUDA graph replays")
            if layer.late_reason is not None:
                row = Row(row.layer, row.name, row.step, row.branch, "dense", 1.0, row.tokens, layer.late_reason)
            elif layer.selected is not None:
                backend, backend_reason, density = layer.selected
                self._check_fast(backend, backend_reason, layer.device_type)
                row = replace(row, backend=backend, backend_reason=backend_reason, density=density)
            elif layer.biased and row.reason is None:
                backend, backend_reason = bias_backend
                self._check_fast(backend, backend_reason, layer.device_type)
                row = replace(row, backend=backend, backend_reason=backend_reason)
            elif layer.dense_runs == STOCK_DENSE:
                row = replace(row, backend_reason=OF_THE_CALL)
            elif layer.dense_runs is not None:
                row = replace(row, backend=ON_KERNEL)
            self.run.report.add(row)
        fused = sum(layer.fuses for layer in self.layers)
        if fused:
            self.run.report.note(f"qk-norm and rotary embedding in one kernel in {fused} layers")
        if self.run.budget.refused:
            self.run.report.note(
                "some layers kept nothing for later steps, because `reuse_gib` "
                f"({self.processor.recipe.schedule.reuse_gib:g}) has no more room"
            )
        self._rows = []
        if self.run.is_last_step:
            if self.run.budget.most:
                self.run.report.note(f"kept from step to step: at most {size_in_words(self.run.budget.most)}")
            # What was kept serves nobody any more; the video is still to be decoded.
            self.run.forget(self.run.branch)

    def _join_densities(self, shards: Shards) -> None:
        """A rank knows what its own heads computed; the report is of all heads."""
        layers = [layer for layer in self.layers if layer.called and layer.late_reason is None and layer.selected]
        if layers:
            own = [layer.selected[2] for layer in layers]
            for layer, density in zip(layers, mean_over_ranks(own, shards, layers[0].device_type), strict=True):
                layer.selected = (*layer.selected[:2], density)

    def _dealt(self, shards: Shards | None, forward: _Forward, parts: Parts | None, memory: Any) -> Shards | None:
        """A layer's shards, with the heads as they were dealt out to the ranks."""
        if shards is None or parts is None or memory is None or not may_deal(parts, shards):
            return shards
        # From the first step on, so that torch.compile sees tensors of one kind in all steps.
        return shards.dealt(memory.heads or tuple(range(shards.num_heads)), forward.device)

    def _check_fast(self, backend: str, reason: str | None, device_type: str) -> None:
        """Note a slow backend on a GPU; under `strict` raise."""
        if device_type != "cuda" or backend in FAST_ON_CUDA:
            return
        self.run.report.note(f'slow backend "{backend}" on {device_type}: {reason}')
        if self.processor.strict:
            raise DenseFallbackError(
                f'Sparse attention would run on the slow backend "{backend}" ({reason}); turn off `strict` to allow it.'
            )

    def _timestep(self, arguments: dict[str, Any]) -> Any:
        """The timestep of this forward, falling from step to step."""
        timestep = arguments.get(self.family.timestep)
        return -timestep if self.family.rising_time and timestep is not None else timestep

    def _layouts(self, arguments: dict[str, Any], config: Any) -> list[TokenLayout]:
        """The layouts that calls of this forward have, the longest first."""
        grid = self.family.grid(arguments, config)
        return [
            self.processor.layout(grid, text_before=before, text_after=after)
            for before, after in self.family.text(arguments, config)
        ]

    def _dense_reason(self, layer: Any, seq_len: int, training: bool) -> str | None:
        if self.processor.always_dense:
            return METHOD_DENSE
        schedule, run = self.processor.recipe.schedule, self.run
        if run.step is None and not training and (schedule.warmup_steps != 0 or schedule.cooldown_steps):
            return UNKNOWN_STEP
        return self.processor.dense_reason(run.step, run.num_steps, layer.layer_index, seq_len)

    def call_shape(self, model: Any, batch: int, seq_len: int) -> CallShape:
        num_heads, head_dim = self.heads(model)
        return CallShape(batch, num_heads, seq_len, head_dim)

    def heads(self, model: Any) -> tuple[int, int]:
        """Number and size of the heads of a target."""
        attention = model.get_submodule(next(iter(self.saved)))
        return _num_heads(attention), _head_dim(attention)

    def _check_strict(self, reasons: Sequence[str | None], seq_len: int, slow: str | None = None) -> None:
        short = self.processor.recipe.schedule.short_reason(seq_len)
        for layer, reason in zip(self.layers, reasons, strict=True):
            if reason is not None and reason not in ASKED_FOR:
                faster = reason in (short, slow)
                remedy = f"set `min_tokens` to 0 to run its {seq_len:,} tokens sparse" if faster else None
                raise DenseFallbackError(
                    f"Layer {layer.layer_name} would run dense at step {self.run.step} ({reason}), which the recipe "
                    f"does not ask for; {remedy or 'change the setting'} or turn off `strict`."
                )

    def _select_backend(
        self, model: Any, hidden_states: Any, mask: Any, needs_grad: bool, heads: int | None, bias: bool = False
    ) -> tuple[str, str]:
        from vidsparse_kernels import select_backend

        attention = model.get_submodule(next(iter(self.saved)))
        device = hidden_states.device
        dtype = _compute_dtype(hidden_states)
        shape = (hidden_states.shape[0], mask.seq_len_q, heads or _num_heads(attention), _head_dim(attention))
        probe = torch.empty((1, 1, 1, 1), dtype=dtype, device=device).expand(shape)
        key_bias = torch.empty((1, 1, 1), device=device).expand(1, 1, mask.seq_len_kv) if bias else None
        name, reason = select_backend(probe, probe, probe, mask, key_bias=key_bias, requires_grad=needs_grad)
        if not bias:  # Whether a mask over keys comes is known only at the call.
            self._check_fast(name, reason, device.type)
        return name, reason


def _zero_projection(attention: Any) -> torch.nn.Linear:
    """The projection of a linear branch, shared by the heads, zero until trained (SLA, section 4.2), as in public code."""
    weight = next(attention.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    linear = torch.nn.Linear(_head_dim(attention), _head_dim(attention), device=weight.device, dtype=dtype)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    return linear


def _num_heads(attention: Any) -> int:
    # Kandinsky's names differ.
    return getattr(attention, "heads", None) or attention.num_heads


def _head_dim(attention: Any) -> int:
    inner_dim = getattr(attention, "inner_dim", None)
    if inner_dim is None:
        inner_dim = (attention.to_q if hasattr(attention, "to_q") else attention.to_query).out_features
    return inner_dim // _num_heads(attention)


def _first_tensor(latents: Any) -> torch.Tensor:
    # Z-Image takes a list with one tensor per sample, or with one list of images per sample.
    while isinstance(latents, list | tuple):
        latents = latents[-1]
    return latents


def _compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """In which attention will be computed."""
    where = hidden_states.device.type
    return torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else hidden_states.dtype


def _skips_scores(attention: Any) -> bool:
    """Whether a guider of diffusers makes this module return its values: it reaches torch's own attention alone."""
    registry = getattr(attention, "_diffusers_hook", None)
    return registry is not None and any(
        getattr(hook, "skip_attention_scores", False) for hook in registry.hooks.values()
    )


class _Before:
    """Forward pre-hook; a class, so that copies of a model carry a hook with their own binding."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.binding.outside_graph:
            _run_eagerly(self.binding.before, model, args, kwargs)


class _After:
    """Forward hook, likewise."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding

    def __call__(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.binding.outside_graph:
            _run_eagerly(self.binding.after, model, args, output)


def _run(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


# Under torch.compile of the whole model the hooks are traced too; masks and reports are no part of a graph.
_run_eagerly: Any = torch.compiler.disable(_run)


class _Rebind:
    """Stands over a method that may replace processors: takes ours off, lets the class do it, and puts ours back."""

    def __init__(self, model: Any, binding: Binding, method: str) -> None:
        self.model, self.binding, self.method = model, binding, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.binding.detach(self.model, keep_projections=True)
        try:
            return getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        finally:
            self.binding.attach(self.model)


class _Compile:
    """Stands over a model's `compile`, so that what the hooks do happens around the graph and not in it.

    Only so does `model.compile(fullgraph=True)` work; `torch.compile(model)` breaks the graph at the hooks, before and
    after the model's own forward.
    """

    def __init__(self, model: Any, binding: Binding) -> None:
        self.model, self.binding = model, binding

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        model = self.model
        type(model).compile(model, *args, **kwargs)
        model._compiled_call_impl = _AroundGraph(model, self.binding, model._compiled_call_impl)


class _AroundGraph:
    """A compiled model's call with the binding's hooks around it."""

    def __init__(self, model: Any, binding: Binding, compiled: Callable[..., Any]) -> None:
        self.model, self.binding, self.compiled = model, binding, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        binding = self.binding
        binding.before(self.model, args, kwargs)
        binding.outside_graph = True
        try:
            output = self.compiled(*args, **kwargs)
        finally:
            binding.outside_graph = False
        binding.after(self.model, args, output)
        return output


class _CacheContext:
    """Stands over a model's `cache_context`: tells the run what the pipeline says, then does what was done before.

    That is what the class does, or `earlier`, which somebody had set on this model.
    """

    def __init__(self, model: Any, run: RunState, earlier: Any = None) -> None:
        self.model, self.run, self.earlier = model, run, earlier

    @contextlib.contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        self.run.enter(name, kwargs.get("step_index"), kwargs.get("num_inference_steps"))
        try:
            inner = self.earlier or functools.partial(type(self.model).cache_context, self.model)
            with inner(name, **kwargs):
                yield
        finally:
            self.run.leave()


def _carry(attribute: str, source: Any, target: Any) -> None:
    """Hand a choice made while bound (attention backend, parallel config) back to the family's processor."""
    value = getattr(source, attribute)
    if getattr(target, attribute) is not value:
        setattr(target, attribute, value)
