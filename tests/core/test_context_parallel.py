"""Sparse attention on two processes under diffusers' context parallelism equals the same on one process.

Run as a script this file is one of the two processes: `python test_context_parallel.py RANK FOLDER cpu|cuda`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vidsparse
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.parts import Parts
from vidsparse.processors.parallel import NO_PLAN, RING, TEXT_LAST, Shards, deal, make_shards, refusal
from vidsparse.testing import CASES, randn
from vidsparse_kernels import BlockMask

WORLD, BLOCK = 2, 16
DEVICE = [torch.device("cpu")]
"""Of this process; set by `main`."""
EVEN = {
    "Wan": 210,
    "Wan I2V": 210,
    "ChronoEdit": 210,
    "LTX-Video": 210,
    "Flux": 178,
    "Flux Kontext": 198,
    "Flux 2": 198,
    "Qwen-Image": 178,
    "Qwen-Image-Edit": 198,
}
"""Families whose tokens divide by two here, and how many they are."""
OPTIONS: Any = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}


class RandomBlocks(vidsparse.RadialProcessor):
    """Radial attention's processor with a mask of random blocks, another for each head where there are `heads`."""

    heads, block = 1, BLOCK

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        return TokenLayout(grid, text_before, text_after, block_size=self.block)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        count = layout.num_blocks
        kept = torch.rand(1, self.heads, count, count, generator=torch.Generator().manual_seed(count)) < 0.3
        kept |= torch.eye(count, dtype=torch.bool)
        kept[..., 0] = True  # The first block holds no padding, so that every row sees a key.
        size: Any = {"q_block_size": self.block, "kv_block_size": self.block}
        mask = BlockMask.from_dense(kept, seq_len_q=layout.seq_len, seq_len_kv=layout.seq_len, **size)
        return mask.to(device), None


class RandomBlocksPerHead(RandomBlocks):
    heads = 2


class LargeBlocks(RandomBlocks):
    """Blocks that the kernels for GPUs take."""

    block = 64


class Selecting(vidsparse.PooledProcessor):
    """Chooses blocks from queries and keys, so each rank chooses for the heads that it has."""

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        return TokenLayout(grid, text_before, text_after, block_size=BLOCK)


def sharpen(model: Any) -> Any:
    """Larger attention weights and no zero output layers, so that what attention does matters for the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and (".to_" in name or "add_" in name or not parameter.any()):
                spread = 1.5 / parameter.shape[1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def build(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = CASES[name].build()
    if config:
        torch.manual_seed(0)
        model = type(model)(**{**model.config, **config})
    return sharpen(model).to(DEVICE[0])


def inputs(name: str, batch: int = 2, text: int = 10, rows: int = 12) -> dict[str, Any]:
    """The family's inputs with text of another length; 10 tokens divide by two ranks, 9 do not."""
    generator = torch.Generator().manual_seed(0)
    given = CASES[name].inputs(batch, generator)
    if name == "MiniMax-H3":
        return given
    given["encoder_hidden_states"] = randn(generator, batch, text, 16)
    if "txt_ids" in given:
        given["txt_ids"] = torch.zeros(text, given["txt_ids"].shape[-1])
        if given["img_ids"].ndim == 3:
            given["txt_ids"] = given["txt_ids"].expand(batch, -1, -1)
    if "encoder_hidden_states_mask" in given:
        valid = torch.tensor([[text - 3], [text]])[:batch]
        given["encoder_hidden_states_mask"] = torch.arange(text) < valid
    if "encoder_attention_mask" in given:
        # A mask over the text of cross-attention is beyond diffusers' Ulysses on its own.
        given["encoder_attention_mask"] = None
    if name == "Wan":
        given["hidden_states"] = randn(generator, batch, 4, 5, rows, 14)
    return {name: x.to(DEVICE[0]) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given, return_dict=False)[0]


def gradients(model: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(model.train(), given).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def parallel(model: Any, **config: Any) -> None:
    from diffusers import ContextParallelConfig  # pyright: ignore[reportPrivateImportUsage]

    model.enable_parallelism(config=ContextParallelConfig(**(config or {"ulysses_degree": WORLD})))


def pair(name: str, processor: Any = RandomBlocks, **changes: Any) -> dict[str, Any]:
    """One family on one process and on both, with the processor set before and after `enable_parallelism`."""
    config, anything = changes.pop("config", {}), changes.pop("anything", False)
    given, settings = inputs(name, **changes), {"ulysses_degree": WORLD}
    if anything:
        settings["ulysses_anything"] = True
    result: dict[str, Any] = {}
    for order in ("before", "after"):
        model, bound = build(name, **config), processor(**OPTIONS, strict=True)
        if order == "before":
            result["stock"] = run(model, given)
            model.set_attn_processor(bound)
            result["want"] = run(model, given)
        parallel(model, **settings)
        if order == "after":
            model.set_attn_processor(bound)
        result[order] = run(model, given)
        rows = bound.report().rows[-2:]
        result[f"{order} rows"] = [(row.backend, row.reason, row.tokens) for row in rows]
    return result


def with_gradients(processor: Any = RandomBlocks, **config: Any) -> dict[str, Any]:
    given, result = inputs("Wan"), {}
    for checkpointing in (False, True):
        model = build("Wan", **config)
        model.set_attn_processor(processor(**OPTIONS, strict=True))
        if checkpointing:
            model.enable_gradient_checkpointing()
        else:
            result["want"] = gradients(model, given)
        parallel(model)
        # Every rank has the gradients of its own tokens.
        shares = gradients(model, given)
        for share in shares.values():
            torch.distributed.all_reduce(share)
        result["replayed" if checkpointing else "got"] = shares
    return result


def compiled(name: str, processor: Any, **config: Any) -> dict[str, Any]:
    """Four steps, the last two without a new graph; heads may be dealt out from the second on."""
    model, given = build(name, **config), inputs(name)
    steps = [{**given, "timestep": given["timestep"] * (1 - 0.1 * step)} for step in range(4)]
    bound = processor(**OPTIONS, strict=True)
    model.set_attn_processor(bound)
    want = [run(model, each) for each in steps]
    parallel(model)
    run(model, steps[0])  # In their first call the hooks of diffusers do what cannot be traced.
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    model.set_attn_processor(bound)
    got = [run(model, each) for each in steps[:2]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [run(model, each) for each in steps[2:]]
    torch._dynamo.reset()
    return {"want": torch.stack(want), "got": torch.stack(got)}


def dealt(method: str, rows: int = 12, head_dim: int = 12, **options: Any) -> dict[str, Any]:
    """Five steps of a model whose first two heads look at little and whose last two look at much."""
    model = build("Wan", num_attention_heads=4, attention_head_dim=head_dim, rope_max_seq_len=128)
    given = inputs("Wan", rows=rows)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.view(4, -1).mul_(torch.tensor([30.0, 30.0, 0.1, 0.1], device=DEVICE[0])[:, None])

    def steps() -> tuple[list[torch.Tensor], Any, list[float]]:
        handle = vidsparse.apply(model, method, **OPTIONS, strict=True, **options)
        out = [
            run(model, {**given, "timestep": torch.full((2,), 900.0 - 100 * step, device=DEVICE[0])})
            for step in range(5)
        ]
        memories = [handle._run.memory(layer.layer_name, None) for layer in handle._bindings["transformer"].layers]
        found = [(memory.loads, memory.heads) for memory in memories]
        handle.remove()
        return out, found, [row.density for row in handle.report().rows]

    want, _, densities = steps()
    parallel(model)
    got, found, joined = steps()
    return {"want": torch.stack(want), "got": torch.stack(got), "layers": found, "densities": (densities, joined)}


def refusals() -> dict[str, str]:
    said = {}
    for name, config, options in (
        ("ring", {"ring_degree": WORLD}, {}),
        ("heads", {"ulysses_degree": WORLD}, {"num_attention_heads": 3}),
    ):
        model = build("Wan", **options)
        parallel(model, **config)
        model.set_attn_processor(RandomBlocks(**OPTIONS, strict=True))
        try:
            run(model, inputs("Wan"))
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    model = build("CogVideoX-2B")
    given = CASES["CogVideoX-2B"].inputs(2, torch.Generator().manual_seed(0))
    model.set_attn_processor(RandomBlocks(**OPTIONS, strict=True))
    want = run(model, given)
    try:
        parallel(model)
    except ValueError as error:
        said["no plan"] = str(error)
    said["no plan, afterwards"] = "the same" if torch.equal(run(model, given), want) else "another output"
    return said


def scenarios() -> dict[str, Any]:
    with torch.no_grad():
        results = {name: pair(name) for name in EVEN}
        results["MiniMax-H3"] = pair("MiniMax-H3", anything=True)
        results["a mask per head"] = pair("Wan", RandomBlocksPerHead)
        results["uneven tokens and heads"] = pair("Wan", rows=10, anything=True, config={"num_attention_heads": 3})
        results["uneven text with padding"] = pair("Qwen-Image", text=9, anything=True)
        results["blocks selected from the tokens"] = pair("Flux", Selecting)
        clusters = {"q_clusters": 5, "k_clusters": 6, "top_p": 0.6, "min_share": 0.0}
        results["dealt"] = {
            "blocks": dealt("pooled", top_p=0.6),
            "clusters": dealt("semantic", **clusters),
            "kept for two steps": dealt("pooled", top_p=0.6, refresh_every=2, keep="state"),
        }
        results["compiled"] = {
            "a mask": compiled("Flux", RandomBlocks),
            "a selection": compiled("Wan", Selecting),
            "dealt heads": compiled("Wan", functools.partial(Selecting, top_p=0.6), num_attention_heads=4),
        }
        results["refusals"] = refusals()
    results["gradients"] = with_gradients()
    return results


def scenarios_on_gpus() -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "attention_head_dim": 64}
    with torch.no_grad():
        return {
            "Wan": pair("Wan", LargeBlocks, config=heads),
            "Flux": pair("Flux", LargeBlocks, config={**heads, "axes_dims_rope": (16, 24, 24)}),
            "uneven": pair("Wan", LargeBlocks, rows=10, anything=True, config={**heads, "num_attention_heads": 3}),
            "dealt": {"blocks": dealt("pooled", rows=240, head_dim=64, top_p=0.6)},
        } | {"gradients": torch.enable_grad()(with_gradients)(LargeBlocks, **heads)}


def gather_any(all_gather: Any, gathered: list[torch.Tensor], x: torch.Tensor, **options: Any) -> None:
    """`all_gather` of tensors of different lengths in dimension 1, which NCCL has and gloo has not."""
    if len({each.shape for each in gathered}) == 1:
        all_gather(gathered, x, **options)
        return
    longest = max(each.shape[1] for each in gathered)
    padded = [x.new_empty(x.shape[0], longest, *x.shape[2:]) for _ in gathered]
    all_gather(padded, F.pad(x, (0, 0, 0, longest - x.shape[1])), **options)
    for each, source in zip(gathered, padded, strict=True):
        each.copy_(source[:, : each.shape[1]])


def main(rank: int, folder: Path, device: str) -> None:
    rendezvous: Any = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": WORLD}
    if device == "cuda":
        DEVICE[0] = torch.device("cuda", rank)
        torch.cuda.set_device(rank)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **rendezvous)
        torch.save(scenarios_on_gpus(), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
        return
    torch.set_num_threads(1)
    # diffusers asks for an accelerator; stand the CPU in for it.
    torch._C._get_accelerator = lambda *_: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.accelerator.device_count = lambda: 1
    torch.distributed.all_gather = functools.partial(gather_any, torch.distributed.all_gather)
    torch.distributed.init_process_group("gloo", **rendezvous)
    torch.save(scenarios(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def two_processes(folder: Path, device: str) -> list[dict[str, Any]]:
    """What each of two processes found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), device],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(tmp_path_factory.mktemp("ranks"), "cpu")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *EVEN.items(),
        ("MiniMax-H3", 267),
        ("a mask per head", 210),
        ("blocks selected from the tokens", 178),
        ("uneven tokens and heads", 175),
        ("uneven text with padding", 177),
    ],
)
def test_two_processes_equal_one(ranks, name, tokens):
    for rank in ranks:
        found = rank[name]
        assert (found["want"] - found["stock"]).abs().max() > 1e-2 * found["stock"].abs().max(), "the mask must matter"
        for order in ("before", "after"):
            torch.testing.assert_close(found[order], found["want"], atol=1e-5, rtol=1e-4)
            assert len(found[f"{order} rows"]) == 2
            for backend, reason, length in found[f"{order} rows"]:
                assert (backend != "dense", reason, length) == (True, None, tokens)


@pytest.mark.parametrize("name", ["blocks", "clusters", "kept for two steps"])
def test_heads_are_dealt_by_what_they_compute(ranks, name):
    heads_were_dealt(ranks, name)
    for rank in ranks:
        torch.testing.assert_close(rank["dealt"][name]["got"], rank["dealt"][name]["want"], atol=1e-5, rtol=1e-4)
        want, joined = rank["dealt"][name]["densities"]
        assert len(set(want)) > 1 and joined == pytest.approx(want, abs=1.1e-4), "the report is of all heads"


def heads_were_dealt(ranks: list[dict[str, Any]], name: str) -> None:
    layers = zip(*(rank["dealt"][name]["layers"] for rank in ranks), strict=True)
    for (first, heads), (second, others) in layers:
        loads = torch.cat([first, second])
        assert heads == others and sorted(heads) == [0, 1, 2, 3], "every rank deals alike"
        before, after = (
            max(loads[hand].sum() for hand in hands) for hands in ([[0, 1], [2, 3]], [[*heads[:2]], [*heads[2:]]])
        )
        assert after < 0.85 * before, f"contiguous heads would keep one rank waiting: {loads.tolist()}"
    for rank in ranks:
        found = rank["dealt"][name]
        assert (found["want"][1:] - found["want"][:-1]).abs().amax((1, 2, 3, 4, 5)).min() > 0


def test_dealing():
    assert deal([1.0, 2.0, 3.0, 4.0], 2) == (0, 3, 1, 2)
    assert deal([9.0, 1.0, 1.0, 1.0], 2) == (0, 3, 1, 2), "as many for each, whatever they weigh"
    loads = torch.rand(40, generator=torch.Generator().manual_seed(0)).exp().pow(3).tolist()
    heads = deal(loads, 8)
    shares = [sum(loads[h] for h in heads[first : first + 5]) for first in range(0, 40, 5)]
    contiguous = [sum(loads[first : first + 5]) for first in range(0, 40, 5)]
    assert sorted(heads) == list(range(40))
    assert max(shares) < 1.05 * sum(shares) / 8 < max(contiguous)


@pytest.mark.parametrize("which", ["got", "replayed"])
def test_gradients_of_the_ranks_add_up(ranks, which):
    for rank in ranks:
        found = rank["gradients"]
        assert found[which].keys() == found["want"].keys()
        assert found["want"]["blocks.0.attn1.to_q.weight"].abs().max() > 0
        for name, grad in found["want"].items():
            torch.testing.assert_close(
                found[which][name], grad, atol=1e-6, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", ["a mask", "a selection", "dealt heads"])
def test_compiled_without_graph_breaks(ranks, name):
    for rank in ranks:
        found = rank["compiled"][name]
        torch.testing.assert_close(found["got"], found["want"], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_split_is_said(ranks):
    for rank in ranks:
        said = rank["refusals"]
        assert said["ring"].startswith("DenseFallbackError") and RING in said["ring"]
        assert said["heads"] == (
            "ConfigError: `ulysses_degree` (2) does not divide the model's 3 attention heads; choose one that does, or "
            "set `ulysses_anything`."
        )
        assert "`cp_plan` must be provided" in said["no plan"]
        assert said["no plan, afterwards"] == "the same"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus_equal_one(tmp_path):
    ranks = two_processes(tmp_path, "cuda")
    heads_were_dealt(ranks, "blocks")
    for rank in ranks:
        found = rank["dealt"]["blocks"]
        torch.testing.assert_close(found["got"], found["want"], atol=2e-4, rtol=1e-3)
        for name in ("Wan", "Flux", "uneven"):
            found = rank[name]
            assert (found["want"] - found["stock"]).abs().max() > 1e-2 * found["stock"].abs().max()
            for order in ("before", "after"):
                torch.testing.assert_close(found[order], found["want"], atol=2e-4, rtol=1e-3)
                assert all(backend != "dense" and reason is None for backend, reason, _ in found[f"{order} rows"])
        for which in ("got", "replayed"):
            for name, grad in rank["gradients"]["want"].items():
                atol = 1e-3 * float(grad.abs().max()) + 1e-6
                torch.testing.assert_close(
                    rank["gradients"][which][name],
                    grad,
                    atol=atol,
                    rtol=1e-2,
                    msg=lambda text, name=name: f"{name}: {text}",
                )


def config(ulysses: int = 1, ring: int = 1, anything: bool = False) -> Any:
    return SimpleNamespace(
        context_parallel_config=SimpleNamespace(ulysses_degree=ulysses, ring_degree=ring, ulysses_anything=anything)
    )


def test_refusals_need_no_processes():
    with_plan, without = type("M", (), {"_cp_plan": {"": {"encoder_hidden_states": None}}})(), type("M", (), {})()
    video = TokenLayout(LatentGrid(2, 3, 4))
    assert refusal(None, without, video) is None
    assert refusal(config(2), with_plan, video) is None
    assert refusal(config(2, 2), with_plan, video) == RING
    assert refusal(config(2), without, video) == NO_PLAN
    assert refusal(config(2), with_plan, TokenLayout(video.grid, text_after=4)) == TEXT_LAST
    with pytest.raises(ConfigError, match="leaves ranks without"):
        make_shards(config(4, anything=True), with_plan, video, 5, torch.device("cpu"))


@pytest.mark.parametrize(("num_heads", "world"), [(3, 2), (6, 3), (7, 3), (40, 8), (30, 8)])
def test_heads_of_a_mask_are_those_of_the_rank(num_heads, world):
    kept = torch.rand(1, num_heads, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    size: Any = {"seq_len_q": 50, "seq_len_kv": 50, "q_block_size": 16, "kv_block_size": 16}
    mask = BlockMask.from_dense(kept, **size)
    shards = [Shards("group", rank, (1,) * world, num_heads) for rank in range(world)]
    split = [each.of_this_rank(Parts(mask)).block_mask for each in shards]
    assert torch.equal(torch.cat([each.to_dense() for each in split if each is not None], 1), kept)
    assert [each.local_heads for each in shards] == [each.num_heads for each in split if each is not None]
    broadcast = Parts(BlockMask.from_dense(kept[:, :1], **size))
    assert shards[0].of_this_rank(broadcast) is broadcast


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
