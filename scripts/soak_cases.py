"""Random cases for `soak_block_sparse.py`: what the kernels are compiled for, and tensors, strides and masks within it.

A case is drawn from (seed, index) alone. Triton compiles again for other head sizes, dtypes, block sizes and flags, and
wherever a length or a stride becomes 1 or starts or stops being a multiple of 16. So these come from a pool of
combinations, and the rest is drawn freely within one: a run compiles about as often as there are combinations.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidsparse_kernels import BlockMask
from vidsparse_kernels.testing import token_mask

HEAD_DIMS = (64, 128, 64, 128, 64, 128, 16, 32, 40, 72, 80, 96, 160, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128, 256)
HEADS = ((1, 1), (2, 1), (3, 1), (2, 2), (1, 4), (2, 3))
"""(kv heads, query heads per kv head)."""
LAYOUTS = (
    "contiguous", "heads first", "fused", "gaps", "padded dim", "odd", "dim not innermost", "expanded batch",
    "expanded heads", "expanded tokens",
)  # fmt: skip
LARGE_DIMS = {"large batch": 0, "large tokens": 1, "large heads": 2}
LARGE_ELEMENTS = (1 << 31) + (1 << 28)
GRADIENTS = ("both", "none", "out", "both", "lse", "none")
PATTERNS = {"random": 8, "empty and full rows": 5, "one per row": 2, "one": 1, "none": 1, "all": 2}
DRAWS = 8000
MAX_LENGTHS = 200
"""Of lengths per combination; those that would compile anew are dropped."""


@dataclass(frozen=True)
class Combination:
    """What kernels are compiled for, with the sizes and strides that the cases of it resemble.

    Attributes:
        num_blocks: blocks of variable size on the side of query and of key; None: uniform.
        mask_lead, offsets_lead, bias_lead: stored batch and heads; `bias_lead` None: no key_bias.
        gradient: "none", or what it comes through: "out", "lse", "both".
        descriptors: use TMA descriptors wherever they are possible, not only where they pay.
        layouts: of query, key, value and the gradient of the output.
    """

    head_dim: int
    dtype: torch.dtype
    q_block_size: int
    kv_block_size: int
    batch: int
    num_kv_heads: int
    num_heads: int
    num_blocks: tuple[int | None, int | None]
    mask_lead: tuple[int, int]
    offsets_lead: tuple[int, int]
    bias_lead: tuple[int, int] | None
    gradient: str
    return_lse: bool
    descriptors: bool
    seq_len_q: int
    seq_len_kv: int
    layouts: tuple[str, str, str, str]

    def shapes(self, seq_len_q: int, seq_len_kv: int) -> list[tuple[int, int, int, int]]:
        """Of query, key, value and the gradient of the output."""
        q = (self.batch, seq_len_q, self.num_heads, self.head_dim)
        kv = (self.batch, seq_len_kv, self.num_kv_heads, self.head_dim)
        return [q, kv, kv, q]


@dataclass(frozen=True)
class Case:
    name: str
    combination: Combination
    tensors: list[Tensor]
    """Query, key, value, each with its strides."""
    grad_out: Tensor
    grad_lse: Tensor
    mask: BlockMask
    key_bias: Tensor | None
    scale: float
    gradient: str
    about: dict[str, Any]
    views: list[Tensor] = field(default_factory=list)
    """Into the large buffer."""


def make_pool(arguments: argparse.Namespace) -> list[Combination]:
    """Combinations in which every head size, dtype and block size occurs about as often as it is listed."""
    rng = random.Random(f"{arguments.seed} pool")
    number = arguments.combinations

    def column(values: Any) -> list[Any]:
        repeated = [values[i % len(values)] for i in range(number)]
        rng.shuffle(repeated)
        return repeated

    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    possible = DTYPES[1:] if os.environ.get("TRITON_INTERPRET") == "1" else DTYPES
    head_dims, dtypes, heads, gradients = (column(x) for x in (HEAD_DIMS, possible, HEADS, GRADIENTS))
    q_block_sizes, kv_block_sizes, batches = column(BLOCK_SIZES), column(BLOCK_SIZES), column((1, 2, 3))
    variable = column({"all": (0, 0, 1), "uniform": (0,), "variable": (1,)}[arguments.kind])
    pool = []
    for i in range(number):
        settings = dict(
            head_dim=head_dims[i],
            dtype=dtypes[i],
            q_block_size=q_block_sizes[i],
            kv_block_size=kv_block_sizes[i],
            batch=batches[i],
            heads=heads[i],
            gradient=gradients[i],
            variable=bool(variable[i]),
        )
        if i % 4 == 0:
            # What video models use, and all that the kernels for one kind of GPU can do.
            settings.update(
                head_dim=rng.choice((64, 128, 64, 128, 72, 80, 96)),
                dtype=rng.choice(possible[:-1]),
                q_block_size=rng.choice((128, 256)),
                kv_block_size=rng.choice((64, 128)),
                descriptors=True,
                layouts=tuple(rng.choice(("contiguous", "heads first", "fused", "gaps")) for _ in range(4)),
            )
        pool.append(make_combination(rng, arguments.max_tokens, **settings))
    if arguments.large:
        for layout in LARGE_DIMS:
            for gradient in ("none", "both"):
                pool.append(
                    make_combination(
                        rng, arguments.max_tokens, head_dim=128, dtype=torch.bfloat16, q_block_size=128,
                        kv_block_size=64, batch=2, heads=(2, 2), gradient=gradient, variable=False, bias=False,
                        descriptors=layout == "large tokens", layouts=(layout,) * 4,
                    )
                )  # fmt: skip
    return pool


def make_combination(
    rng: random.Random,
    max_tokens: int,
    *,
    head_dim: int,
    dtype: torch.dtype,
    q_block_size: int,
    kv_block_size: int,
    batch: int,
    heads: tuple[int, int],
    gradient: str,
    variable: bool,
    bias: bool | None = None,
    descriptors: bool | None = None,
    layouts: tuple[str, ...] | None = None,
) -> Combination:
    """Fill in at random what is not given."""
    num_kv_heads, num_heads = heads[0], heads[0] * heads[1]

    def lead() -> tuple[int, int]:
        return rng.choice((1, batch)), rng.choice((1, num_heads))

    num_blocks: tuple[int | None, int | None] = (None, None)
    if variable:
        counts = rng.choice((1, 3, 7, 13, 30)), rng.choice((1, 3, 7, 13, 30))
        num_blocks = rng.choice(((counts[0], counts[1]), (counts[0], None), (None, counts[1])))
    large = layouts is not None and layouts[0] in LARGE_DIMS
    seq_len_q, seq_len_kv = draw_lengths(rng, max_tokens, batch * num_heads, dtype)
    if bias is None:
        bias = rng.random() < 0.3
    if layouts is None:
        # Half of the time as models pass them.
        plain = rng.random() < 0.5
        layouts = tuple(rng.choice(LAYOUTS[:3] if plain else LAYOUTS) for _ in range(4))
    if gradient != "none":
        # Equal keys or values have gradients that cancel to 0, of which only the rounding could be compared.
        layouts = (layouts[0], *(x.replace("expanded tokens", "expanded batch") for x in layouts[1:]))
    return Combination(
        head_dim=head_dim,
        dtype=dtype,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        batch=batch,
        num_kv_heads=num_kv_heads,
        num_heads=num_heads,
        num_blocks=num_blocks,
        mask_lead=lead(),
        offsets_lead=lead(),
        bias_lead=lead() if bias else None,
        gradient=gradient,
        return_lse=rng.random() < 0.5,
        descriptors=rng.random() < 0.5 if descriptors is None else descriptors,
        seq_len_q=max(2, seq_len_q) if large else seq_len_q,
        seq_len_kv=max(2, seq_len_kv) if large else seq_len_kv,
        layouts=(layouts[0], layouts[1], layouts[2], layouts[3]),
    )


def draw_lengths(
    rng: random.Random, max_tokens: int, maps: int, dtype: torch.dtype, like: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Tokens of query and key: mostly ragged, now and then 1 or a whole number of blocks; bounded scores in all."""
    # Eager attention in fp32 sums the products of few tokens by another algorithm with smaller errors than it has for
    # many, which says nothing about what a tile of them may have.
    least = 32 if dtype == torch.float32 else 1

    def draw(example: int | None) -> int:
        kind = rng.random()
        if example == least or example is None and kind < 0.06:
            return least
        if max_tokens >= 128 and (example % 128 == 0 if example else kind < 0.2):
            return 128 * rng.randint(1, max_tokens // 128)
        return rng.randint(least, min(80, max_tokens) if kind > 0.8 else max_tokens)

    q, kv = (draw(None if like is None else like[side]) for side in (0, 1))
    while maps * q * kv > 4 * max_tokens**2 and max(q, kv) > least:
        q, kv = (max(least, q // 2), kv) if q > kv else (q, max(least, kv // 2))
    return q, kv


def compile_key(combination: Combination, seq_len_q: int, seq_len_kv: int) -> list[Any]:
    """Everything about the lengths and strides that Triton may compile differently for.

    It treats an integer as 1, as a multiple of 16, as any other, or as wider than 32 bits. Which numbers kernels take
    is guessed: lengths, blocks, tiles of any size, and the strides of inputs, results and lists that follow from them.
    """
    c, numbers = combination, []
    sides = ((seq_len_q, c.q_block_size, c.num_blocks[0]), (seq_len_kv, c.kv_block_size, c.num_blocks[1]))
    blocks = [-(-length // size) if count is None else count for length, size, count in sides]
    tiles = (16, 32, 64, 128)
    whole = []
    for (length, size, count), other in zip(sides, reversed(blocks), strict=True):
        rows = [length, other, length * c.num_heads * c.head_dim, length * c.num_kv_heads * c.head_dim]
        rows += [-(-length // tile) for tile in tiles if tile <= max(size, 32)]
        whole += [length % tile == 0 for tile in tiles]
        if count is not None:
            # Room for tiles of variable blocks: see `tiles.py`.
            own = [(length + count * (tile - 1)) // tile for tile in tiles[1:]]
            listed = [(length + (count + 1) // 2 * (tile - 1)) // tile for tile in tiles[1:]]
            rows += own + listed + [n * other for n in listed]
        numbers += rows
    numbers += [blocks[0] * blocks[1]]
    numbers += [n * c.num_heads for n in (*blocks, blocks[0] * blocks[1], seq_len_q, seq_len_kv)]
    shapes = c.shapes(seq_len_q, seq_len_kv)
    return [*map(_kind, numbers), whole, [layout_key(*x, c.dtype) for x in zip(c.layouts, shapes, strict=True)]]


@cache
def lengths_alike(combination: Combination, max_tokens: int) -> list[tuple[int, int]]:
    """Lengths of query and key that compile to the same as those of the combination, which come first."""
    c, lengths = combination, [(combination.seq_len_q, combination.seq_len_kv)]
    rng = random.Random(repr(c))
    key = compile_key(c, *lengths[0])
    for _ in range(DRAWS):
        if len(lengths) == MAX_LENGTHS:
            break
        drawn = draw_lengths(rng, max_tokens, c.batch * c.num_heads, c.dtype, lengths[0])
        if compile_key(c, *drawn) == key:
            lengths.append(drawn)
    return lengths


def layout_key(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    strides, offset = strides_of(layout, shape)
    steps = [stride for stride, size in zip(strides[:3], shape, strict=False) if size > 1]
    # TMA reads rows of 16 bytes and nothing that is repeated.
    aligned = all(step > 0 and step * dtype.itemsize % 16 == 0 for step in (*steps, offset or 16))
    return [*map(_kind, strides), aligned, offset * dtype.itemsize % 16 == 0]


def _kind(number: int) -> str:
    if number > 2**31 - 1:
        return "wide"
    return "1" if number == 1 else "multiple" if number % 16 == 0 else "other"


def strides_of(layout: str, shape: tuple[int, ...]) -> tuple[tuple[int, int, int, int], int]:
    """Strides of `[batch, seq_len, heads, head_dim]` in elements, and the offset of the first one."""
    b, s, h, d = shape
    if layout in LARGE_DIMS:
        sizes, strides = [b, s, h], [s * h * d, h * d, d]
        dim = LARGE_DIMS[layout]
        inner = d
        for other in reversed([i for i in range(3) if i != dim]):
            strides[other], inner = inner, inner * sizes[other]
        # The last index lies beyond int32, the first not.
        strides[dim] = -(-((1 << 31) + (1 << 20)) // max(1, sizes[dim] - 1) // 16) * 16
        return (strides[0], strides[1], strides[2], 1), 0
    padded = {"gaps": d + 16, "padded dim": d + 8, "odd": d + 3}.get(layout, d)
    strides, offset = [s * h * padded, h * padded, padded, 1], 0
    if layout == "heads first":
        strides[1], strides[2] = d, s * d
    elif layout == "fused":
        strides[0], strides[1], offset = 3 * s * h * d, 3 * h * d, h * d
    elif layout == "gaps":
        strides[0], strides[1] = 2 * s * (h + 1) * padded, 2 * (h + 1) * padded
    elif layout == "odd":
        strides[0], offset = strides[0] + 1, 1
    elif layout == "dim not innermost":
        strides[2], strides[3] = 1, h
    elif layout.startswith("expanded"):
        strides[("expanded batch", "expanded tokens", "expanded heads").index(layout)] = 0
    return (strides[0], strides[1], strides[2], strides[3]), offset


def number_of_combination(arguments: argparse.Namespace, pool: list[Combination], index: int) -> int:
    """Which of the pool the case of this index belongs to."""
    return random.Random(f"{arguments.seed} {index}").randrange(len(pool))


def make_case(
    arguments: argparse.Namespace,
    pool: list[Combination],
    index: int,
    buffer: Tensor | None = None,
) -> Case:
    """Case `index`; those with strides beyond int32 lie in `buffer`, a vector of `LARGE_ELEMENTS` NaN."""
    rng = random.Random(f"{arguments.seed} {index}")
    device = arguments.device
    c = pool[rng.randrange(len(pool))]
    lengths = rng.choice(lengths_alike(c, arguments.max_tokens))
    layouts = [
        alike(rng, layout, shape, c, equal_tokens=i == 0)
        for i, (layout, shape) in enumerate(zip(c.layouts, c.shapes(*lengths), strict=True))
    ]
    pattern = rng.choices(list(PATTERNS), list(PATTERNS.values()))[0]
    mask = draw_mask(rng, c, lengths, pattern, device)
    generator = torch.Generator(device).manual_seed(rng.getrandbits(48))
    bias = None
    if c.bias_lead is not None:
        bias = torch.randn(*c.bias_lead, lengths[1], generator=generator, device=device)
        shut = torch.rand(bias.shape, generator=generator, device=device)
        bias.masked_fill_(shut < rng.choice((0.0, 0.2, 0.7, 1.0)), -torch.inf)
    keys = token_mask(mask) if bias is None else token_mask(mask) & (bias > -torch.inf).unsqueeze(2)
    counts = keys.sum(-1)
    # In fp16 the products of larger values overflow in eager attention, which then allows nothing.
    large = 4.0 if c.dtype == torch.float16 else 30.0
    gradient, factors = c.gradient, [1.0, 1.0, *(rng.choice((1.0, 1.0, 0.01, large)) for _ in range(2))]
    if gradient != "none" and bool(((counts > 0) & (counts < 4)).any()):
        # A row with one key has no gradient through its output. Eager attention finds that exactly, which leaves no
        # budget for rounding; a gradient through the LSE that outweighs the output's makes one.
        gradient = "both" if gradient == "out" else gradient
        factors[2:] = 1.0, 0.1
    made = [
        strided(layout, shape, c.dtype, generator, factor, rng.choice((0, 0, 16, 4096)), buffer, i)
        for i, (layout, shape, factor) in enumerate(zip(layouts, c.shapes(*lengths), factors, strict=True))
    ]
    grad_lse = torch.randn(c.batch, c.num_heads, lengths[0], generator=generator, device=device)
    # Nothing may come through a row that attends to nothing, whatever it is.
    grad_lse.masked_fill_(counts == 0, torch.nan)
    about = {
        "head_dim": c.head_dim,
        "dtype": str(c.dtype).removeprefix("torch."),
        "batch": c.batch,
        "heads": [c.num_heads, c.num_kv_heads],
        "seq_len": list(lengths),
        "block_size": [c.q_block_size, c.kv_block_size],
        "num_variable_blocks": list(c.num_blocks),
        "mask": f"{pattern}, stored {c.mask_lead}, offsets {c.offsets_lead}",
        "layouts": list(layouts),
        "key_bias": c.bias_lead,
        "gradient": gradient,
        "descriptors": c.descriptors,
    }
    scale = rng.uniform(0.3, 2.0) / math.sqrt(c.head_dim)
    views = [x for x, layout in zip(made, layouts, strict=True) if layout in LARGE_DIMS]
    name = f"{arguments.seed}:{index}"
    return Case(name, c, made[:3], made[3], grad_lse, mask, bias, scale, gradient, about, views)


def alike(
    rng: random.Random, layout: str, shape: tuple[int, ...], combination: Combination, *, equal_tokens: bool
) -> str:
    """A layout that compiles to the same as this one."""
    if layout in LARGE_DIMS:
        return layout
    key = layout_key(layout, shape, combination.dtype)
    allowed = [x for x in LAYOUTS if equal_tokens or combination.gradient == "none" or x != "expanded tokens"]
    return rng.choice([x for x in allowed if layout_key(x, shape, combination.dtype) == key])


def strided(
    layout: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    factor: float,
    shift: int,
    buffer: Tensor | None,
    number: int,
) -> Tensor:
    """Random normal values in a layout, NaN in every gap."""
    strides, offset = strides_of(layout, shape)
    stored = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    if layout in LARGE_DIMS:
        assert buffer is not None
        # Tensors of one case lie behind each other, or interleaved where a step leaves little room.
        offset = number * (1 << (14 if layout == "large tokens" else 23))
    else:
        offset += shift
        size = offset + 1 + sum((n - 1) * stride for n, stride in zip(stored, strides, strict=True))
        buffer = torch.full((size,), torch.nan, dtype=dtype, device=generator.device)
    view = buffer.as_strided(stored, strides, offset)
    view.copy_(torch.randn(stored, generator=generator, device=generator.device) * factor)
    return view.expand(shape)


def draw_mask(rng: random.Random, c: Combination, lengths: tuple[int, int], pattern: str, device: str) -> BlockMask:
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    sizes = (c.q_block_size, c.kv_block_size)
    blocks, offsets = [], {}
    for side, length, size, count in zip(("q", "kv"), lengths, sizes, c.num_blocks, strict=True):
        blocks.append(-(-length // size) if count is None else count)
        if count is not None:
            cuts = torch.randint(0, length + 1, (*c.offsets_lead, count + 1), generator=generator)
            cuts[..., 0], cuts[..., -1] = 0, length
            offsets[f"{side}_offsets"] = cuts.sort(-1).values.to(torch.int32).to(device)
    shape = (*c.mask_lead, *blocks)
    dense = torch.rand(shape, generator=generator) < rng.random()
    rows = torch.rand(shape[:3], generator=generator)
    if pattern == "empty and full rows":
        dense[rows < 0.25], dense[rows > 0.8] = False, True
    elif pattern == "one per row":
        dense = torch.zeros_like(dense).scatter_(
            -1, torch.randint(0, shape[3], (*shape[:3], 1), generator=generator), True
        )
    elif pattern == "one":
        dense = torch.zeros_like(dense)
        dense[..., rng.randrange(shape[2]), rng.randrange(shape[3])] = True
    elif pattern in ("none", "all"):
        dense.fill_(pattern == "all")
    return BlockMask.from_dense(
        dense.to(device), seq_len_q=lengths[0], seq_len_kv=lengths[1], q_block_size=c.q_block_size,
        kv_block_size=c.kv_block_size, **offsets,
    )  # fmt: skip
