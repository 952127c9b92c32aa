"""Train `vidsparse-tiny`, the bundled text-to-video model, from scratch on clips that the project draws itself.

    python scripts/train_tiny_model.py --work-dir runs/tiny --output pipelines/vidsparse_pipelines/models/vidsparse-tiny

One GPU. Stages: the VAE; latents of the training clips (cached in the work folder); the diffusion transformer with
its text encoder; the prompt checker; export in diffusers' Wan format. Each stage has a budget in seconds and its
learning rate follows the share of it that is spent, so the whole takes what the budgets add up to on any GPU.
Everything is saved under --work-dir; run the same command again to go on where it stopped (--stop-after SECONDS ends
a run early on purpose). `--smoke` shrinks everything to run in about two minutes on a CPU.
"""

# diffusers exports its classes lazily, which pyright takes for private.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidsparse_pipelines.clips import caption, render, sample_params, vocabulary
from vidsparse_pipelines.clips.grammar import ClipSpec, sample_split

#: No file of the package is larger than 16 MiB.
MAX_FILE_BYTES = 16_700_000
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, besides the wall clock. Sizes are (height, width) in pixels."""

    seed: int = 0
    small: tuple[int, int] = (64, 96)
    large: tuple[int, int] = (96, 160)
    num_frames: int = 81
    # Model: spatial factor 8 (2 by patches, 4 by strides), temporal factor 4, one latent position a token.
    z_dim: int = 32
    vae_base_dim: int = 24
    vae_decoder_base_dim: int = 24
    num_heads: int = 4
    head_dim: int = 64
    num_layers: int = 8
    ffn_dim: int = 768
    text_dim: int = 128
    text_layers: int = 3
    text_length: int = 40
    # Budgets, seconds.
    vae_seconds: float = 270.0
    dit_seconds: float = 650.0
    checker_seconds: float = 65.0
    # Training.
    vae_lr: float = 2e-3
    vae_batch: int = 8
    vae_kl: float = 1e-4
    vae_muon: bool = True
    cached_small: int = 24576
    cached_large: int = 14336
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    ema: float = 0.998
    flow_shift: float = 3.0
    caption_dropout: float = 0.1
    word_dropout: float = 0.01
    batch_small: int = 64
    batch_large: int = 24
    batch_short: int = 256
    compile: bool = True

    @property
    def patch_factor(self) -> int:
        return 8


SMOKE = replace(
    Config(),
    small=(32, 48),
    large=(48, 64),
    num_frames=17,
    vae_base_dim=8,
    vae_decoder_base_dim=8,
    z_dim=8,
    num_heads=2,
    head_dim=24,
    num_layers=2,
    ffn_dim=64,
    text_dim=32,
    text_layers=1,
    vae_seconds=25.0,
    dit_seconds=40.0,
    checker_seconds=0.0,
    vae_batch=4,
    cached_small=64,
    cached_large=32,
    batch_small=8,
    batch_large=4,
    batch_short=16,
    compile=False,
)


class Clock:
    """Seconds spent per stage, summed over runs, and the end of this run."""

    def __init__(self, work_dir: Path, stop_after: float | None):
        self.path = work_dir / "clock.json"
        self.spent: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.deadline = time.monotonic() + stop_after if stop_after else math.inf

    def add(self, stage: str, seconds: float) -> float:
        self.spent[stage] = self.spent.get(stage, 0.0) + seconds
        return self.spent[stage]

    def save(self) -> None:
        write_text(self.path, json.dumps(self.spent, indent=1))

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# ------------------------------------------------------------------------------------------------------------- models


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A closed vocabulary of the grammar's words; every other word is `<unk>`."""
    words = [PAD, EOS, UNK, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=512
    )


def build_vae(c: Config) -> Any:
    return AutoencoderKLWan(
        base_dim=c.vae_base_dim,
        decoder_base_dim=c.vae_decoder_base_dim,
        z_dim=c.z_dim,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * c.z_dim,
        latents_std=[1.0] * c.z_dim,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=c.patch_factor,
    )


def build_text_encoder(c: Config, vocab_size: int) -> Any:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=c.text_dim,
            d_kv=c.text_dim // 4,
            d_ff=3 * c.text_dim,
            num_layers=c.text_layers,
            num_heads=4,
            relative_attention_num_buckets=32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer(c: Config) -> Any:
    model: Any = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.z_dim,
        out_channels=c.z_dim,
        text_dim=c.text_dim,
        freq_dim=256,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        cross_attn_norm=True,
        rope_max_seq_len=1024,
    )
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    nn.init.zeros_(model.proj_out.weight)
    return model


# ---------------------------------------------------------------------------------- VAE: whole clips instead of chunks


def _whole_resample(self: WanResample, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """What diffusers' chunk-by-chunk resampling amounts to on a whole clip (first frame apart)."""
    if self.mode == "upsample3d":
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            b, ch, t, h, w = rest.shape
            rest = self.time_conv(rest).reshape(b, 2, ch, t, h, w).transpose(1, 2).transpose(2, 3)
            rest = rest.reshape(b, ch, 2 * t, h, w)
        x = torch.cat((first, rest), 2)
    b, _, t, _, _ = x.shape
    x = x.transpose(1, 2).flatten(0, 1)
    x = self.resample(x.contiguous(memory_format=torch.channels_last))
    x = x.unflatten(0, (b, t)).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], self.time_conv(x)), 2)
    return x


def _fused_rms_norm(self: WanRMS_norm, x: Tensor) -> Tensor:
    last = x.movedim(1, -1)
    return F.rms_norm(last, (last.shape[-1],), self.gamma.flatten().to(x.dtype), 1e-12).movedim(-1, 1)


def whole_clip_mode(vae: Any) -> Any:
    """Make `vae.encoder(x)` and `vae.decoder(z, first_chunk=True)` take whole clips, for training."""
    for m in vae.modules():
        if isinstance(m, WanResample):
            m.forward = types.MethodType(_whole_resample, m)
        elif isinstance(m, WanRMS_norm):
            m.forward = types.MethodType(_fused_rms_norm, m)
        elif isinstance(m, nn.Conv3d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def encode_moments(vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    x = patchify(clips, 2).contiguous(memory_format=torch.channels_last_3d)
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    return mean.float(), logvar.float().clamp(-30, 20)


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), 2)


def psnr(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Peak-to-peak 2 (pixels in [-1, 1])."""
    return 10 * torch.log10(4.0 / (a.float() - b.float()).square().mean(dims).clamp(min=1e-10))


def draw(c: Config, rng: random.Random, count: int, size: tuple[int, int], device, frames=None, held_out=False):
    specs = [sample_split(rng, held_out) for _ in range(count)]
    params = sample_params(specs, rng, *size).to(device)
    return specs, render(params, frames or c.num_frames, *size)


def train_vae(c: Config, clock: Clock, work_dir: Path, device: torch.device) -> bool:
    """L1 + MSE + edges + a little KL on clips of full length; returns whether the stage is finished."""
    torch.manual_seed(c.seed)
    vae = whole_clip_mode(build_vae(c).to(device))
    inner = [p for n, p in vae.named_parameters() if p.ndim >= 4 and ".conv_in." not in n and ".conv_out." not in n]
    known = {id(p) for p in inner} if c.vae_muon else set()
    rest = [p for p in vae.parameters() if id(p) not in known]
    optimizers: list = [torch.optim.AdamW(rest, lr=c.vae_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if c.vae_muon:
        optimizers.append(Muon(inner, lr=c.vae_lr, weight_decay=0.0))
    path = work_dir / "vae_state.safetensors"
    step = load_training_state(path, vae.state_dict(), optimizers)
    spent = clock.spent.get("vae", 0.0)
    history, saved_at = [], time.monotonic()
    while spent < c.vae_seconds and not clock.out_of_time:
        started = time.monotonic()
        share = spent / c.vae_seconds
        for group in [g for o in optimizers for g in o.param_groups]:
            group["lr"] = c.vae_lr * min(1.0, (step + 1) / 100) * min(1.0, 1.4 * (1 - share))
        rng = random.Random(f"vae {c.seed} {step}")
        large = step % 4 == 3
        size = c.large if large else c.small
        _, clips = draw(c, rng, max(1, c.vae_batch // 2) if large else c.vae_batch, size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = encode_moments(vae, clips)
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            out = decode_whole(vae, latents).float()
        error = out - clips
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + c.vae_kl * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step <= 2:
            quality = psnr(out, clips, (0, 1, 3, 4)).tolist()
            history.append(sum(quality) / len(quality))
            log(
                f"vae {share:5.1%} step {step} loss {loss.item():.4f} kl {kl.item():.2f} size {size} psnr "
                f"first {quality[0]:.1f} middle {quality[len(quality) // 2]:.1f} last {quality[-1]:.1f}"
            )
        if step % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        spent = clock.add("vae", time.monotonic() - started)
        if time.monotonic() - saved_at > 120:
            save_training_state(path, vae.state_dict(), optimizers, step)
            clock.save()
            saved_at = time.monotonic()
    save_training_state(path, vae.state_dict(), optimizers, step)
    clock.save()
    if spent < c.vae_seconds:
        return False
    save_tensors(work_dir / "vae.safetensors", vae.state_dict(), {"steps": str(step)})
    return True


def save_training_state(path: Path, modules: dict[str, Tensor], optimizers: list, step: int) -> None:
    tensors = {f"module.{k}": v for k, v in modules.items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(path, tensors, {"step": str(step)})


def load_training_state(path: Path, modules: dict[str, Tensor], optimizers: list) -> int:
    """Fill modules and optimizers in place; returns the step to go on from (0 where there is nothing saved)."""
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for k, v in modules.items():
            v.copy_(tensors[f"module.{k}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, v in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = v
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def load_vae(c: Config, work_dir: Path, device: torch.device) -> Any:
    vae = build_vae(c)
    vae.load_state_dict(load_file(work_dir / "vae.safetensors"))
    return vae.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- latents


def cache_latents(c: Config, clock: Clock, work_dir: Path, device: torch.device) -> None:
    """Encode the training clips once, standardised per channel; specs are drawn again from their seeds."""
    started = time.monotonic()
    vae = whole_clip_mode(load_vae(c, work_dir, device))
    tensors = {}
    for name, size, total in (("small", c.small, c.cached_small), ("large", c.large, c.cached_large)):
        batch, parts = 64 if name == "small" else 32, []
        for start in range(0, total, batch):
            _, clips = draw(c, clip_rng(c, name, start), min(batch, total - start), size, device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                parts.append(encode_moments(vae, clips)[0].to(torch.bfloat16))
        tensors[name] = torch.cat(parts)
        log(f"latents {name}: {list(tensors[name].shape)} after {time.monotonic() - started:.0f} s")
    sample = tensors["small"][:4096].float()
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    for name in ("small", "large"):  # in parts: the whole in float32 would not fit a small GPU
        for part in tensors[name].split(1024):
            part.copy_((part.float() - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1))
    save_tensors(work_dir / "latents.safetensors", tensors | {"mean": mean, "std": std})
    clock.add("latents", time.monotonic() - started)
    clock.save()


def clip_rng(c: Config, name: str, start: int) -> random.Random:
    return random.Random(f"clips {c.seed} {name} {start}")


def cached_specs(c: Config, name: str) -> list[ClipSpec]:
    """The specs of the cached latents, in their order."""
    total, batch = (c.cached_small, 64) if name == "small" else (c.cached_large, 32)
    specs: list[ClipSpec] = []
    for start in range(0, total, batch):
        rng = clip_rng(c, name, start)
        specs += [sample_split(rng, False) for _ in range(min(batch, total - start))]
    return specs


# ------------------------------------------------------------------------------------------------ diffusion transformer


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2).to(x.dtype)


def attend(attn: Any, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None):
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def block_forward(block, x: Tensor, text: Tensor, time: Tensor, rope, bias: Tensor) -> Tensor:
    """`WanTransformerBlock.forward` with a bias on the text keys (the padding, see `text_bias`)."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + time.float()).chunk(6, dim=1)
    h = block.norm1(x) * (1 + scale) + shift
    x = x + attend(block.attn1, h, h, rope, None).float() * gate
    x = x + attend(block.attn2, block.norm2(x), text, None, bias).float()
    h = block.norm3(x) * (1 + ff_scale) + ff_shift
    return x + block.ffn(h).float() * ff_gate


def text_bias(lengths: Tensor, width: int, padded_to: int) -> Tensor:
    """Additive bias `[batch, 1, 1, width]` that makes `width` text columns act like `padded_to` of them.

    WanPipeline pads text embeddings with zeros to `max_sequence_length` and attends to the padding. All padding
    columns are equal, so one of them with the logarithm of their number as a bias gives the same softmax.
    """
    column = torch.arange(width, device=lengths.device)
    lengths = lengths.view(-1, 1)
    first_pad = torch.log((padded_to - lengths).float())
    bias = torch.where(column < lengths, 0.0, torch.where(column == lengths, first_pad, -math.inf))
    return bias.view(-1, 1, 1, width)


def transformer_forward(model: Any, run_block, x: Tensor, sigma: Tensor, text: Tensor, bias: Tensor):
    """`WanTransformer3DModel.forward` on latents `[b, c, t, h, w]`; text `[b, width, dim]`."""
    cos, sin = model.rope(x)
    rope = (cos[..., 0::2], sin[..., 1::2])
    _, _, frames, height, width = x.shape
    h = model.patch_embedding(x).flatten(2).transpose(1, 2).float()
    temb, time, text, _ = model.condition_embedder(sigma * 1000, text, None)
    time = time.unflatten(1, (6, -1))
    for block in model.blocks:
        h = run_block(block, h, text, time, rope, bias)
    shift, scale = (model.scale_shift_table + temb.float().unsqueeze(1)).chunk(2, dim=1)
    out = model.proj_out(model.norm_out(h) * (1 + scale) + shift)
    return out.transpose(1, 2).unflatten(2, (frames, height, width))


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), scaled to Adam's step size (Moonshot 2025).

    torch.optim.Muon does the same one matrix at a time; stacking the matrices of one shape is what makes it cheap
    for a small model with eighty of them. Convolutions count as matrices `[out, in * kernel]`.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = [p.grad for p in params if p.grad is not None]  # all: the loss reaches every matrix
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).flatten(2)
                scale = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
                update = (orthogonalize(update) * scale).view(-1, *shape)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, list(update.unbind(0)))


def orthogonalize(g: Tensor) -> Tensor:
    x = g.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def encode_text(tokenizer, encoder: Any, captions: list[str], c: Config, device, drop=None):
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=c.text_length, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask
    if drop is not None:
        unknown = (torch.rand(ids.shape, generator=drop) < c.word_dropout) & (ids > 2)
        ids = torch.where(unknown, 2, ids)
    ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
    hidden = encoder(ids, mask).last_hidden_state
    return hidden * mask.unsqueeze(-1), mask.sum(1)


def train_dit(c: Config, clock: Clock, work_dir: Path, device: torch.device) -> bool:
    """Rectified flow in latent space; returns whether the stage is finished."""
    torch.manual_seed(c.seed + 1)
    tokenizer = build_tokenizer()
    model = build_transformer(c).to(device)
    encoder = build_text_encoder(c, len(tokenizer)).to(device)
    params = {f"transformer.{n}": p for n, p in model.named_parameters()}
    params |= {f"text_encoder.{n}": p for n, p in encoder.named_parameters()}
    matrices = [p for n, p in params.items() if ".blocks." in n and p.ndim == 2]
    rest = [p for n, p in params.items() if not (".blocks." in n and p.ndim == 2)]
    muon = Muon(matrices, lr=c.muon_lr)
    adam = torch.optim.AdamW(rest, lr=c.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ema = {n: p.detach().clone() for n, p in params.items()}
    path = work_dir / "dit_state.safetensors"
    saved = {n: p.data for n, p in params.items()} | {f"ema.{n}": p for n, p in ema.items()}
    step = load_training_state(path, saved, [muon, adam])

    data = load_file(work_dir / "latents.safetensors")
    latents = {n: data[n].to(device) for n in ("small", "large")}
    specs = {n: cached_specs(c, n) for n in ("small", "large")}
    run_block = torch.compile(block_forward, dynamic=False) if c.compile else block_forward
    if c.compile:
        torch._dynamo.config.cache_size_limit = 64
    full = latents["small"].shape[2]
    spent = clock.spent.get("dit", 0.0)
    saved_at, mean_loss, seen = time.monotonic(), {}, {"small": 0, "large": 0, "short": 0}
    while spent < c.dit_seconds and not clock.out_of_time:
        started = time.monotonic()
        share = spent / c.dit_seconds
        rate = min(1.0, (step + 1) / 200) * min(1.0, 2 * (1 - share))
        for optimizer, lr in ((muon, c.muon_lr), (adam, c.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
        # First short clips, then long ones, then both sizes; a few shorter ones all along. Every pair of size and
        # length is compiled once, so there are only five.
        name = "large" if share >= 0.42 and step % 4 else "small"
        frames, batch = full, c.batch_large if name == "large" else c.batch_small
        if share < 0.12 or (name == "small" and step % 12 == 4):
            frames, batch = min(5, full), c.batch_short
        elif name == "small" and step % 12 == 8:
            frames, batch = min(13, full), c.batch_small * 3 // 2
        elif name == "large" and step % 12 == 9:
            frames, batch = min(9, full), c.batch_large * 2
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
        rng = random.Random(f"dit {c.seed} {step}")
        index = torch.randint(len(specs[name]), (batch,), generator=generator)
        clean = latents[name][index.to(device), :, :frames].float()
        captions = ["" if rng.random() < c.caption_dropout else caption(specs[name][i], rng) for i in index.tolist()]
        u = torch.sigmoid(torch.randn(batch, generator=generator))
        sigma = (c.flow_shift * u / (1 + (c.flow_shift - 1) * u)).to(device)
        noise = torch.randn(clean.shape, device=device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text, lengths = encode_text(tokenizer, encoder, captions, c, device, generator)
            bias = text_bias(lengths, c.text_length, rng.choice((64, 64, 226, 512)))
            velocity = transformer_forward(model, run_block, noisy, sigma, text, bias)
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()
        muon.step()
        adam.step()
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        decay = min(c.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        kind = "short" if frames < full else name
        seen[kind] += batch
        mean_loss.setdefault(kind, []).append(loss.detach())
        step += 1
        if step % 100 == 0:
            means = {k: f"{torch.stack(v).mean().item():.4f}" for k, v in mean_loss.items()}
            log(f"dit {share:5.1%} step {step} loss {means} seen {seen}")
            mean_loss = {}
        if step % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        spent = clock.add("dit", time.monotonic() - started)
        if time.monotonic() - saved_at > 120:
            save_training_state(path, saved, [muon, adam], step)
            clock.save()
            saved_at = time.monotonic()
    save_training_state(path, saved, [muon, adam], step)
    save_tensors(work_dir / "dit.safetensors", ema, {"steps": str(step)})
    clock.save()
    return spent >= c.dit_seconds


# -------------------------------------------------------------------------------------------------------------- export


def build_pipeline(c: Config, work_dir: Path) -> WanPipeline:
    tokenizer: Any = build_tokenizer()
    weights, data = load_file(work_dir / "dit.safetensors"), load_file(work_dir / "latents.safetensors")
    transformer, encoder = build_transformer(c), build_text_encoder(c, len(tokenizer))
    part = {
        prefix: {n.removeprefix(f"{prefix}."): p for n, p in weights.items() if n.startswith(f"{prefix}.")}
        for prefix in ("transformer", "text_encoder")
    }
    transformer.load_state_dict(part["transformer"])
    encoder.load_state_dict(part["text_encoder"], strict=False)  # the tied copy of the embedding is not listed
    vae = load_vae(c, work_dir, torch.device("cpu"))
    vae.register_to_config(latents_mean=data["mean"].tolist(), latents_std=data["std"].tolist())
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=c.flow_shift, num_train_timesteps=1000
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder.eval(), vae=vae, scheduler=scheduler, transformer=transformer.eval()
    )


def export(c: Config, work_dir: Path, output: Path) -> None:
    """Write the diffusers folder under a temporary name, then rename."""
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe = build_pipeline(c, work_dir).to(torch.bfloat16)
    pipe.save_pretrained(temporary, max_shard_size=MAX_FILE_BYTES)
    # transformers 5 writes a class name that transformers 4 does not know; this one both do.
    for name, key in (("model_index.json", "tokenizer"), ("tokenizer/tokenizer_config.json", "tokenizer_class")):
        config = json.loads((temporary / name).read_text())
        config[key] = ["transformers", "PreTrainedTokenizerFast"] if key == "tokenizer" else "PreTrainedTokenizerFast"
        (temporary / name).write_text(json.dumps(config, indent=2) + "\n")
    scheduler = temporary / "scheduler/scheduler_config.json"  # without settings that only some diffusers know
    config = {k: v for k, v in json.loads(scheduler.read_text()).items() if v is not None}
    scheduler.write_text(json.dumps(config, indent=2) + "\n")
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    if output.exists():
        shutil.rmtree(output)
    os.replace(temporary, output)


@torch.no_grad()
def check_vae(c: Config, folder: Path, device: torch.device, count: int = 32) -> dict[str, object]:
    """Reconstruction PSNR of held-out clips per frame, through the pipeline's own chunk-by-chunk decode."""
    result: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype)
        vae = vae.to(device)
        for name, size in (("small", c.small), ("large", c.large)):
            rng = random.Random(f"check {c.seed} {name}")
            scores, frames = [], []
            for _ in range(0, count, 8):
                _, clips = draw(c, rng, min(8, count), size, device, held_out=True)
                out = vae.decode(vae.encode(clips.to(dtype)).latent_dist.mode()).sample
                scores.append(psnr(out, clips, (1, 2, 3, 4)))
                frames.append((out.float() - clips).square().mean((0, 1, 3, 4)))
            per_frame = 10 * torch.log10(4.0 / torch.stack(frames).mean(0))
            chosen = sorted({0, 1, 4, 8, c.num_frames // 2, c.num_frames - 2, c.num_frames - 1})
            result[f"{name} {str(dtype).removeprefix('torch.')}"] = {
                "clips": count,
                "psnr_mean_over_clips": round(torch.cat(scores).mean().item(), 2),
                "psnr_lowest_clip": round(torch.cat(scores).min().item(), 2),
                "psnr_lowest_frame": round(per_frame.min().item(), 2),
                "psnr_by_frame": {str(i): round(per_frame[i].item(), 2) for i in chosen},
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for checkpoints and cached latents")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--checker", type=Path, help="file for the prompt checker; trained only where given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=float, help="end this run after so many seconds, to be resumed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and budgets, to see that everything runs")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a Config field")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = replace(SMOKE if args.smoke else Config(), seed=args.seed)
    for item in args.set:
        name, value = item.split("=", 1)
        config = replace(config, **{name: json.loads(value)})
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    known = args.work_dir / "config.json"
    if known.exists() and json.loads(known.read_text()) != json.loads(json.dumps(asdict(config))):
        raise SystemExit(f"{known} holds another configuration; give another --work-dir or remove it")
    write_text(known, json.dumps(asdict(config), indent=1))
    clock = Clock(args.work_dir, args.stop_after)

    if not (args.work_dir / "vae.safetensors").exists() and not train_vae(config, clock, args.work_dir, device):
        return log("stopped while training the VAE; run again to go on")
    if not (args.work_dir / "latents.safetensors").exists():
        if clock.out_of_time:
            return log("stopped before the latents; run again to go on")
        cache_latents(config, clock, args.work_dir, device)
    finished = train_dit(config, clock, args.work_dir, device)
    export(config, args.work_dir, args.output)
    if not finished:
        return log(f"stopped while training the transformer; {args.output} holds the average so far")
    if args.checker and not args.checker.exists():
        train_the_checker(config, clock, args.output, args.checker, device)
    summary = {
        "config": asdict(config),
        "seconds": {k: round(v, 1) for k, v in clock.spent.items()},
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "vae": check_vae(config, args.output, device, 32 if not args.smoke else 8),
    }
    write_text(args.output / "training.json", json.dumps(summary, indent=1) + "\n")
    log(json.dumps({"seconds": summary["seconds"], "vae": summary["vae"]}, indent=1))


def train_the_checker(c: Config, clock: Clock, folder: Path, path: Path, device: torch.device) -> None:
    """A share of its clips goes through the VAE, so that it judges content rather than the decoder's texture."""
    from vidsparse_pipelines.clips.checker import save_checker, train_checker, validate_checker

    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae")
    vae = whole_clip_mode(vae.to(device).eval().requires_grad_(False))

    @torch.no_grad()
    def through_vae(clips: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return decode_whole(vae, encode_moments(vae, clips)[0]).float().clamp(-1, 1)

    started = time.monotonic()
    checker = train_checker(device, c.checker_seconds, seed=c.seed, corrupt=through_vae, log=log)
    scores = validate_checker(checker, device)
    log(f"checker on held-out real clips: {scores}")
    save_checker(checker, path, scores)
    clock.add("checker", time.monotonic() - started)
    clock.save()


if __name__ == "__main__":
    main()
