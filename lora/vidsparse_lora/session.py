"""What a run consists of besides its losses: model, data, optimizers, log, checkpoints, validation."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsparse.errors import ConfigError
from vidsparse.methods import processor_class
from vidsparse.processors.base import SparseProcessor
from vidsparse_lora.adapter import FILE_NAME, save_adapter, start_from
from vidsparse_lora.checkpoint import Checkpoint, last_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from vidsparse_lora.checkpointing import OffloadedCheckpoint
from vidsparse_lora.config import CLIPS, LengthExtensionConfig, TrainConfig, few_steps, is_few_step, without_guidance
from vidsparse_lora.data import (
    SELF,
    Batch,
    Batches,
    LatentCache,
    Prompts,
    drawn_clips,
    folder_videos,
    prompt_list,
    self_made,
)
from vidsparse_lora.distribution import Distribution, distribution_of, share_sequences, share_weights
from vidsparse_lora.families import family_of, inspect_trainable
from vidsparse_lora.files import write_bytes
from vidsparse_lora.log import Figures, tracker_names
from vidsparse_lora.objective import seed_of
from vidsparse_lora.roles import STUDENT, Roles
from vidsparse_pipelines.load import load_pipeline
from vidsparse_pipelines.model_info import ModelInfo
from vidsparse_pipelines.provenance import model_identity
from vidsparse_pipelines.ranks import indivisible
from vidsparse_pipelines.rope import stretch_time

PARK_BYTES = 2**30
"""Text encoder and VAE beyond this size wait in the CPU's memory while the transformer trains."""


class Optimized:
    """The weights of one role with their optimizer and running average."""

    def __init__(
        self, name: str, parameters: list[tuple[str, torch.nn.Parameter]], config: TrainConfig, rate: float
    ) -> None:
        self.name, self.config, self.rate = name, config, rate
        self.names = [n for n, _ in parameters]
        self.parameters = [p for _, p in parameters]
        self.optimizer = _optimizer(config, self.parameters, rate)
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []

    def to(self, device: torch.device) -> None:
        """Move weights and average, before the first step."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(device)
        self.average = [average.to(device) for average in self.average]

    def step(self, step: int, distribution: Distribution) -> Tensor:
        """Apply the gradients that were collected, of all processes; returns their norm."""
        distribution.reduce_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor(self.config, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            decay = min(self.config.ema, (step + 1) / (step + 10))
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)
        return norm

    def weights(self) -> dict[str, Tensor]:
        """What is saved as the result: the average where there is one."""
        return dict(zip(self.names, self.average or self.parameters, strict=True))

    def swap_average(self) -> None:
        """Put the average in place of the weights, or back."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            held = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(held)

    def tensors(self) -> dict[str, Tensor]:
        held = {f"{self.name}.weight.{n}": p for n, p in zip(self.names, self.parameters, strict=True)}
        if self.average:
            held |= {f"{self.name}.average.{n}": p for n, p in zip(self.names, self.average, strict=True)}
        return held | optimizer_tensors(self.optimizer, f"{self.name}.optimizer.")

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for i, name in enumerate(self.names):
                self.parameters[i].copy_(tensors[f"{self.name}.weight.{name}"])
                if self.average:
                    self.average[i].copy_(tensors[f"{self.name}.average.{name}"])
        load_optimizer(self.optimizer, tensors, f"{self.name}.optimizer.")


def _optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    betas = (config.adam_betas[0], config.adam_betas[1])
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=config.weight_decay)
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("The optimizer 'adamw8bit' needs `pip install bitsandbytes`.") from error
    return bitsandbytes.optim.AdamW8bit(parameters, lr=rate, betas=betas, weight_decay=config.weight_decay)


def rate_factor(config: TrainConfig, step: int) -> float:
    """Share of the learning rate in force at a step."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    done = min(1.0, step / config.max_steps)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return warm * fall[config.lr_schedule]


def resolve_sizes(config: TrainConfig, info: ModelInfo) -> list[tuple[int, int]]:
    """The training sizes as (height, width), checked against the model's rules for sizes and lengths."""
    from vidsparse.cli.arguments import parse_size

    sizes = [parse_size(text, info.preset.sizes) for text in config.sizes] or [(info.preset.height, info.preset.width)]
    for height, width in sizes:
        info.check_size(height, width)
        for length in config.num_frames:
            if info.snap_frames(length) != length:
                raise ConfigError(
                    f"`num_frames` {length} does not fit this model: {info.frame_reason()}; use "
                    f"{info.snap_frames(length)}."
                )
            info.check_length(length, height, width)
    return sizes


class Session:
    """One run, on one process of possibly several.

    Args:
        config: the settings.
        echo: told what the user should see.

    Raises:
        VidsparseError: one sentence; all settings are checked before the model is loaded.
    """

    def __init__(self, config: TrainConfig, echo: Callable[[str], None] | None = None) -> None:
        from accelerate import Accelerator

        self.config, self.folder = config, Path(config.output_dir).expanduser()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        processor_class(config.method)(**config.student_options)
        names: list[Any]
        names, where = tracker_names(config.trackers)
        info = inspect_trainable(config.model)
        family = family_of(info)
        if is_few_step(config) and config.expert is not None:
            raise ConfigError("`stage` few-step makes whole videos, which takes both experts; use sparsify.")
        if is_few_step(config) and (family.from_image or family.images or family.objective != "flow matching"):
            makes = "needs pictures" if family.from_image else "makes images" if family.images else None
            raise ConfigError(
                f"`stage` few-step makes videos from prompts alone with a model of flow matching, and {info.name!r} "
                f"{makes or f'is trained by {family.objective}'}; use sparsify."
            )
        if family.images and config.num_frames != (1,):
            raise ConfigError(f"{info.name!r} makes images; set `num_frames` to 1, got {list(config.num_frames)}.")
        if family.from_image and without_guidance(config):
            raise ConfigError(
                f"`teacher_guidance` needs an empty prompt alone, and {info.name!r} has pictures too; use 1."
            )
        if family.from_image and config.data.startswith(SELF):
            raise ConfigError(f"`data` 'self:' makes clips from prompts alone, and {info.name!r} needs pictures.")
        self.sizes = resolve_sizes(config, info)
        self.accelerator = Accelerator(
            cpu=config.device == "cpu", log_with=names or None, project_dir=str(self.folder)
        )
        self.distribution = distribution_of(self.accelerator, config.context_parallel)
        self.device: torch.device = self.accelerator.device
        self._echo = echo or (lambda text: print(text, file=sys.stderr, flush=True))
        self._settings = {**config.decisive(), "num_processes": self.accelerator.num_processes}
        checkpoint = last_checkpoint(self.folder / "checkpoints", self._settings, self.say)
        sources = [] if is_few_step(config) else self._sources()
        prompts = prompt_list(config.data, config.num_clips, config.seed) if is_few_step(config) else []

        # Weights that are shared out need never be whole on a GPU, unless the model makes the clips.
        later = self.distribution.fsdp is not None and not config.data.startswith(SELF)
        loaded = load_pipeline(
            info,
            dtype=config.dtype,
            device=str(self.device),
            offload="none",
            on_cpu=("transformer", "transformer_2") if later else (),
        )
        loaded.pipe.set_progress_bar_config(disable=True)
        text_length = config.text_length or info.preset.max_sequence_length or family.default_text_length
        self.backbone = family(loaded.pipe, info, self.device, loaded.dtype, text_length, config.expert, config.fps)
        if family.objective != "flow matching":
            self.say(f"the objective of {info.pipeline_class} is {family.objective}, not flow matching")
        self.identity = model_identity(info)
        self.batches = None if is_few_step(config) else self._encode(sources)
        self.prompts = Prompts(prompts, self.backbone, config.batch_size, config.seed) if is_few_step(config) else None
        self.empty_text = self.backbone.encode_text([""])[0]
        self.flow_shift = config.flow_shift or self.backbone.flow_shift
        self._park()

        lengthens = isinstance(config, LengthExtensionConfig)
        self.rope = config.rope_scaling(info.temporal) if lengthens else None
        for transformer in (loaded.pipe.transformer, getattr(loaded.pipe, "transformer_2", None)):
            if self.rope is not None and transformer is not None:
                stretch_time(transformer, **self.rope)
        # Of two experts the other one keeps its own attention.
        target = loaded.pipe if config.expert is None else self.backbone.transformer
        self.roles = Roles(target, config.method, config.student_options)
        self.optimized: dict[str, Optimized] = {}
        self.add_role(STUDENT, config.learning_rate)
        if config.init_lora is not None:
            start_from(config.init_lora, list(zip(*self._named(STUDENT), strict=True)))
        if config.gradient_checkpointing:
            how = OffloadedCheckpoint() if config.offload_activations else None
            self.backbone.transformer.enable_gradient_checkpointing(how)
        self.backbone.transformer.train()
        self.step, self.seconds = 0, 0.0
        self._checkpoint = checkpoint
        self._sums: dict[str, list[Tensor]] = {}
        self._trackers = names
        self.say(where)

    # Setting up

    def _named(self, role: str) -> tuple[list[str], list[torch.nn.Parameter]]:
        optimized = self.optimized[role]
        return optimized.names, optimized.parameters

    def add_role(self, name: str, rate: float) -> Optimized:
        """Give a role its adapter and optimizer."""
        config = self.config
        self.roles.add_adapter(
            name,
            rank=config.rank,
            alpha=config.lora_alpha,
            targets=self.backbone.targets if config.targets == TrainConfig.targets else config.targets,
            dropout=config.lora_dropout,
            seed=seed_of(config.seed, "adapter", name),
        )
        named = list(self.roles.adapters[name])
        if name == STUDENT:
            named += self.roles.extra_parameters()
        self.optimized[name] = Optimized(name, named, config, rate)
        self.roles.student()
        return self.optimized[name]

    def _sources(self) -> list[Any]:
        config = self.config
        if config.data.startswith(SELF):
            file = config.data.removeprefix(SELF)
            how = f"{config.validation_steps} {config.validation_guidance} {config.dtype}"
            return self_made(file, config.num_clips, config.num_frames, self.sizes, config.seed, how, self._make_clip)
        if config.data == CLIPS:
            return drawn_clips(config.num_clips, config.num_frames, self.sizes, config.seed, self.device)
        return folder_videos(config.data, config.num_frames, self.sizes, config.fps)

    def _make_clip(self, prompt: str, seed: int, num_frames: int, height: int, width: int) -> Tensor:
        """A clip by the model as it came, for `data` self."""
        from vidsparse_lora.validation import generate

        return generate(self, [prompt], [seed], num_frames, height, width)[0].cpu() * 2 - 1

    def _encode(self, sources: list[Any]) -> Batches:
        config = self.config
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else self.folder / "cache"
        settings = {
            **self.identity,
            "text_length": self.backbone.text_length,
            "vae": str(self.backbone.pipe.vae.dtype),
        }
        cache = LatentCache(folder, settings, self.say)
        several = 16 if config.data == CLIPS and self.device.type == "cuda" else 1
        # One process encodes, the others then find everything there.
        if self.accelerator.is_main_process:
            cache.fill(sources, self.backbone, several)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            cache.fill(sources, self.backbone, several)
        return Batches(cache, config.batch_size, config.seed)

    def _park(self, on_device: bool = False) -> None:
        """Move what does not train out of the GPU's memory, or back for a validation."""
        for part in self.backbone.idle:
            if sum(p.numel() * p.element_size() for p in part.parameters()) > PARK_BYTES:
                part.to(self.device if on_device else "cpu")

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one; start the log."""
        if self._checkpoint is not None:
            for optimized in self.optimized.values():
                optimized.load(self._checkpoint.tensors)
            self.step, self.seconds = self._checkpoint.step, self._checkpoint.seconds
            self.say(f"going on from step {self.step}")
            self._checkpoint = None
        if self.accelerator.is_main_process:
            self.figures = Figures(self.folder / "log.jsonl", self.step)
            self._write_config()
        if self._trackers:
            self.accelerator.init_trackers("vidsparse", config={k: str(v) for k, v in self.config.to_dict().items()})

    def _write_config(self) -> None:
        import yaml

        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        write_bytes(self.folder / "config.yaml", text.encode())

    # While it runs

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self._echo(text)

    @property
    def done(self) -> bool:
        if self.step >= self.config.max_steps:
            return True
        # Every process must stop at the same step, so the first one's clock decides.
        over = self.config.max_seconds is not None and self.seconds >= self.config.max_seconds
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(over)], device=self.device)
            from accelerate.utils import broadcast

            over = bool(broadcast(flag).item())  # pyright: ignore[reportAttributeAccessIssue]
        return over

    def position(self, micro: int) -> int:
        """Position of a batch among all batches of the training, over steps and processes."""
        groups, group = self.distribution.groups, self.distribution.group
        return (self.step * self.config.gradient_accumulation + micro) * groups + group

    @property
    def captions(self) -> list[str]:
        """Every caption that is trained on."""
        if self.prompts is not None:
            return self.prompts.captions
        assert self.batches is not None
        return sorted({entry.caption for entry in self.batches.cache.entries})

    def prompt_text(self, micro: int) -> Tensor:
        """Padded text `[batch, text_length, dim]` of a training without videos."""
        assert self.prompts is not None
        return self.backbone.pad_text(self.prompts[self.position(micro)])

    def latent_shape(self, count: int) -> torch.Size:
        """Shape of the latents of `count` videos of the longest length and the last size."""
        pipe, (height, width) = self.backbone.pipe, self.sizes[-1]
        frames = (max(self.config.num_frames) - 1) // self.backbone.info.temporal + 1
        ratio = getattr(pipe, "vae_spatial_compression_ratio", None) or pipe.vae_scale_factor_spatial
        channels = self.backbone.latent_channels
        return torch.Size((count, channels, frames, height // ratio, width // ratio))

    def sample_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count]` noise levels on the device."""
        sampling = self.config.timestep_sampling
        return self.backbone.sample_sigma(count, self.flow_shift, sampling, generator).to(self.device)

    def batch(self, micro: int) -> tuple[Batch, Tensor, Any]:
        """A batch with its latents and what `velocity` takes beside them on the device, some captions left empty."""
        assert self.batches is not None
        batch = self.batches[self.position(micro)]
        rng = random.Random(seed_of(self.config.seed, "caption", self.position(micro)))
        texts = [self.empty_text if rng.random() < self.config.caption_dropout else text for text in batch.texts]
        image = None if batch.images is None else batch.images.to(self.device)
        return batch, *self.backbone.split(batch.latents.to(self.device), self.backbone.pad_text(texts), image)

    def guided_velocity(self, noisy: Tensor, sigma: Tensor, text: Any, scale: float) -> Tensor:
        """The velocity with classifier-free guidance, of whatever role is on."""
        velocity = self.backbone.velocity(noisy, sigma, text)
        if scale == 1:
            return velocity
        empty = self.backbone.pad_text([self.empty_text] * len(noisy))
        plain = self.backbone.velocity(noisy, sigma, empty)
        return plain + scale * (velocity - plain)

    def generator(self, purpose: str, micro: int, device: str | torch.device = "cpu") -> torch.Generator:
        """A random generator for one purpose of one forward."""
        return torch.Generator(device).manual_seed(seed_of(self.config.seed, purpose, self.position(micro)))

    def noise(self, shape: torch.Size, micro: int, purpose: str = "noise") -> Tensor:
        return torch.randn(shape, generator=self.generator(purpose, micro, self.device), device=self.device)

    def backward(self, loss: Tensor) -> None:
        (loss / self.config.gradient_accumulation).backward()

    def update(self, role: str) -> Tensor:
        """Apply a role's gradients, averaged over batches."""
        return self.optimized[role].step(self.step, self.distribution)

    def run(self, train_step: Callable[[], dict[str, Tensor]]) -> Path:
        """Train until `max_steps` or `max_seconds`; returns the finished adapter's file."""
        before = torch.are_deterministic_algorithms_enabled()
        if self.config.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            self._share()
            return self._run(train_step)
        except AssertionError as error:
            if not indivisible(error):
                raise
            raise ConfigError(
                f"`context_parallel` {self.config.context_parallel} does not divide the tokens of a video or text; choose "
                "other `num_frames` and `sizes`, or another number."
            ) from error
        finally:
            torch.use_deterministic_algorithms(before)

    def _share(self) -> None:
        """Give each process its share of sequences and frozen weights, once all adapters are there."""
        transformer, shares = self.backbone.transformer, self.distribution
        if shares.sequence > 1:
            self.backbone.check_splits()
        share_sequences(transformer, shares, self.device)
        if shares.fsdp is not None:
            for optimized in self.optimized.values():
                optimized.to(self.device)
            trained = [p for optimized in self.optimized.values() for p in optimized.parameters]
            share_weights(transformer, shares, self.device, trained)
        if self.config.compile:
            self._check_compile()
            transformer.compile_repeated_blocks()

    def _check_compile(self) -> None:
        """Raises ConfigError where compiled blocks would fail or be wrong."""
        processor = self.roles.handle.processor
        static = processor.always_dense or type(processor).build_mask is not SparseProcessor.build_mask
        why = None
        if is_few_step(self.config):
            why = "few-step runs the teacher between a student's forward and its backward pass, and a graph forgets which is which"
        elif not static:
            why = f"{self.config.method!r} selects from query and key, which a graph cannot differentiate"
        elif self.distribution.together:
            why = "it has not been made to go with weights or sequences that are shared out"
        elif not getattr(self.backbone.transformer, "_repeated_blocks", None):
            why = f"{type(self.backbone.transformer).__name__} has no repeated blocks"
        if why is not None:
            raise ConfigError(f"`compile` cannot be used here: {why}; leave it out.")

    def _run(self, train_step: Callable[[], dict[str, Tensor]]) -> Path:
        self.resume()
        config = self.config
        while not self.done:
            started = time.monotonic()
            # For dropout, which draws from torch's own generator; each share of a sequence has its own.
            place = self.distribution.place
            torch.manual_seed(seed_of(config.seed, "step", self.position(0), *([place] if place else [])))
            figures = train_step()
            self.step += 1
            self._note(figures, started)
            self.seconds += time.monotonic() - started
            if self.step % config.checkpoint_every == 0 and not self.done:
                self.save()
            if config.validate_every > 0 and self.step % config.validate_every == 0 and not self.done:
                self.validate()
        self.save()
        path = self.save_adapter()
        if config.validate_every >= 0:
            self.validate()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return path

    def _note(self, figures: dict[str, Tensor], started: float) -> None:
        for name, value in figures.items():
            self._sums.setdefault(name, []).append(value.detach())
        if self.step % self.config.log_every and self.step != 1:
            return
        tensors = {name: torch.stack([v.float() for v in values]).mean() for name, values in self._sums.items()}
        means = {name: self.distribution.mean(tensor).item() for name, tensor in tensors.items()}
        self._sums.clear()
        for name, value in means.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"`{name}` became {value} at step {self.step}; lower `learning_rate`, or use dtype float32."
                )
        density = self.roles.handle.report().sparse_density
        if density is not None:
            means["density"] = density
        means |= {"seconds": self.seconds + time.monotonic() - started}
        self.add_figures(means)
        self.say(f"step {self.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in means.items()))

    def add_figures(self, figures: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.figures.add(self.step, figures)
        if self._trackers:
            self.accelerator.log({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=self.step)

    def save(self) -> None:
        """Write a checkpoint; what is trained is whole on every process."""
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for optimized in self.optimized.values():
            tensors |= optimized.tensors()
        checkpoint = Checkpoint(self.step, self.seconds, tensors)
        save_checkpoint(self.folder / "checkpoints", checkpoint, self._settings, self.config.keep_checkpoints)

    def save_adapter(self) -> Path:
        path = self.folder / FILE_NAME
        if self.accelerator.is_main_process:
            config = self.config
            training = {
                "recipe": self.roles.handle.recipe.to_dict(),
                "model": self.identity,
                "num_frames": list(config.num_frames),
                "sizes": [list(size) for size in self.sizes],
                "num_inference_steps": few_steps(config),
                "guidance_scale": 1.0 if without_guidance(config) else None,
                "flow_shift": self.flow_shift,
                "trained_steps": self.step,
                "expert": config.expert,
                "rope": self.rope,
                "seconds": round(self.seconds, 1),
            }
            peft_config = self.backbone.transformer.peft_config[STUDENT]
            save_adapter(path, self.optimized[STUDENT].weights(), config, peft_config, training)
            self.say(f"saved {path}")
        return path

    def validate(self) -> dict[str, Any]:
        """Make the validation videos with the averaged weights, on the first process, or on all where each has a share."""
        from vidsparse_lora.validation import validate

        figures: dict[str, Any] = {}
        if self.backbone.from_image:
            self.say("no validation videos: they would need pictures")
        elif self.accelerator.is_main_process or self.distribution.together:
            student = self.optimized[STUDENT]
            student.swap_average()
            self._park(on_device=True)
            self.backbone.transformer.eval()
            self.roles.student()
            self.roles.handle.reset()
            try:
                figures = validate(self)
            finally:
                student.swap_average()
                self._park()
                self.backbone.transformer.train()
                self.roles.handle.reset()
        self.add_figures(figures)
        if figures:
            self.say(f"validation at step {self.step}: " + "  ".join(f"{k} {v}" for k, v in figures.items()))
        self.accelerator.wait_for_everyone()
        return figures
