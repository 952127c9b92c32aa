"""What a training run is: frozen settings, read from one YAML file, every one documented here and nowhere else."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from vidsparse.errors import ConfigError
from vidsparse_pipelines.bundled import BUNDLED_MODEL
from vidsparse_pipelines.rope import ROPE_KINDS

TIMESTEP_SAMPLINGS = ("logit-normal", "uniform")
LR_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
DTYPES = ("float32", "bfloat16")
CLIPS = "clips"
STAGES = ("sparsify", "few-step")

MAY_CHANGE = frozenset(
    "max_steps max_seconds log_every checkpoint_every keep_checkpoints validate_every validation_prompts "
    "validation_clips validation_steps validation_guidance validation_seed trackers device output_dir cache_dir".split()
)
"""Settings that a run may be continued with other values of: none of them changes a step."""

LATER: dict[str, Any] = {
    "expert": None,
    "rope": None,
    "rope_factor": None,
    "context_parallel": 1,
    "offload_activations": False,
    "compile": False,
}
"""Settings that checkpoints of an earlier version lack, with the values that mean what was meant then."""


@dataclass(frozen=True)
class TrainConfig:
    """What both kinds of training share.

    Attributes:
        output_dir: folder of checkpoints, validation videos, the log and the finished adapter.
        model: the bundled model's name, a local diffusers folder or a hub id.
        data: "clips" (drawn by the project's own renderer, for the bundled model) or a folder of videos with captions
            (a `.txt` beside each, or `metadata.jsonl` or `metadata.csv` with `file_name` and `text`), or
            "self:PROMPTS.txt": clips that the dense model makes from the prompts of a file, one a line, with
            `validation_steps` and `validation_guidance`. A few-step
            student takes prompts alone: captions of "clips", or a text file with one prompt a line.
        expert: which of two transformers trains (Wan 2.2 A14B): "high" or "low" noise, each in its own range of noise
            levels and in a run of its own. Default: the only one.
        cache_dir: folder of encoded latents and texts, default `cache` in `output_dir`.
        num_clips: clips to draw or to make when `data` is "clips" or "self:".
        num_frames: lengths in pixel frames; a video is cut to the longest that it fills.
        sizes: sizes in pixels, "WIDTHxHEIGHT" or a name of the model's preset; a video goes to the one nearest to its
            shape. Default: the preset's own.
        fps: rate that videos are read at, frames per second; default: as they are.
        text_length: text tokens that the model gets, default the model's own.
        caption_dropout: share of samples whose caption is left empty, so that guidance still works.
        method: sparse attention method of the student; "dense" for comparison.
        method_options: its options and those of its schedule, such as `density` and `dense_layers`. `min_tokens` is 0
            unless given, so that what is trained sparse runs sparse; `warmup_steps` is 0 for a few-step student.
        rank: of the LoRA matrices.
        alpha: LoRA scale is alpha / rank; default: `rank`.
        targets: regular expression over module names that get a LoRA, matched in full. The default stands for q, k, v and
            out of the self-attention over the video, whatever the family calls them.
        lora_dropout: dropout on the LoRA's input.
        init_lora: adapter file to start from, default none.
        flow_shift: shift of the timestep distribution, default the model's scheduler's.
        timestep_sampling: "logit-normal" or "uniform", before the shift.
        max_steps: optimizer steps.
        max_seconds: stop after so many seconds of training in all runs together, weights saved first; default none.
        batch_size: samples in one forward on one device.
        gradient_accumulation: forwards per optimizer step.
        optimizer: "adamw" or "adamw8bit" (needs bitsandbytes and a GPU).
        learning_rate: of the LoRA.
        lr_schedule: "constant", "linear" or "cosine" (both to 0 at `max_steps`), after the warm-up.
        lr_warmup_steps: steps over which the rate rises from 0.
        weight_decay: of AdamW.
        adam_betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema: decay of the running average of the weights, which is what gets saved; 0 for none.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        offload_activations: keep what `gradient_checkpointing` keeps, one input for each block, in the CPU's memory.
        compile: compile the model's repeated blocks by torch.compile, for methods that do not select from query and key;
            the log then lacks the density.
        dtype: "float32" or "bfloat16", of the frozen weights and of the arithmetic; LoRA weights are float32 always.
        device: "auto", "cpu" or "cuda".
        context_parallel: processes that share each sequence, for videos that outgrow one GPU (Ulysses, by diffusers);
            it divides the model's heads and tokens and the number of processes.
        seed: everything random follows from it and from the step.
        deterministic: take torch's deterministic algorithms, so that a resumed run is the same to the bit on a GPU too;
            slower. On the CPU it is so anyway.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints; there is one at the end always.
        keep_checkpoints: how many of them stay.
        validate_every: steps between two validations; 0: at the end only; -1: never.
        validation_prompts: prompts of the validation videos; default: held-out captions for the bundled model.
        validation_clips: number of held-out captions then.
        validation_steps: denoising steps, default the preset's.
        validation_guidance: guidance scale, default the preset's.
        validation_seed: of the first validation video; video i has this plus i.
        trackers: names known to accelerate, such as "wandb" or "trackio"; "auto" is TensorBoard if it is installed.
            `log.jsonl` is written always.

    Raises:
        ConfigError: a value is out of range.
    """

    kind: ClassVar[str] = "training"

    output_dir: str = "runs/lora"
    model: str = BUNDLED_MODEL
    data: str = CLIPS
    expert: str | None = None
    cache_dir: str | None = None
    num_clips: int = 1024
    num_frames: tuple[int, ...] = (81,)
    sizes: tuple[str, ...] = ()
    fps: float | None = None
    text_length: int | None = None
    caption_dropout: float = 0.1
    method: str = "radial"
    method_options: dict[str, Any] = field(default_factory=dict)
    rank: int = 64
    alpha: float | None = None
    targets: str = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    lora_dropout: float = 0.0
    init_lora: str | None = None
    flow_shift: float | None = None
    timestep_sampling: str = "logit-normal"
    max_steps: int = 1000
    max_seconds: float | None = None
    batch_size: int = 1
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 20
    weight_decay: float = 0.0
    adam_betas: tuple[float, ...] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema: float = 0.0
    gradient_checkpointing: bool = True
    offload_activations: bool = False
    compile: bool = False
    dtype: str = "bfloat16"
    device: str = "auto"
    context_parallel: int = 1
    seed: int = 0
    deterministic: bool = False
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int = 0
    validation_prompts: tuple[str, ...] = ()
    validation_clips: int = 8
    validation_steps: int | None = None
    validation_guidance: float | None = None
    validation_seed: int = 0
    trackers: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        for name, low in (
            ("num_clips", 1),
            ("rank", 1),
            ("max_steps", 1),
            ("batch_size", 1),
            ("gradient_accumulation", 1),
            ("context_parallel", 1),
            ("lr_warmup_steps", 0),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("keep_checkpoints", 1),
            ("validate_every", -1),
            ("validation_clips", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"`{name}` must be at least {low}, got {getattr(self, name)}.")
        for name in ("caption_dropout", "lora_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("alpha", "fps", "flow_shift", "max_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name, allowed in (
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
            ("lr_schedule", LR_SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ConfigError("`offload_activations` moves what `gradient_checkpointing` keeps; set that to true too.")
        if self.expert not in (None, "high", "low"):
            raise ConfigError(f"`expert` must be 'high' or 'low', got {self.expert!r}.")
        if not self.num_frames or any(n < 1 for n in self.num_frames):
            raise ConfigError(f"`num_frames` must list lengths of at least 1 frame, got {list(self.num_frames)}.")
        if len(self.adam_betas) != 2:
            raise ConfigError(f"`adam_betas` must be two numbers, got {list(self.adam_betas)}.")

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def student_options(self) -> dict[str, Any]:
        """Options of the student's method, as they are applied and saved. A few-step student has no dense warm-up."""
        return {"min_tokens": 0, **({"warmup_steps": 0} if is_few_step(self) else {}), **self.method_options}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what a step does."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in MAY_CHANGE and (name not in LATER or value != LATER[name])
        }


@dataclass(frozen=True)
class LengthExtensionConfig(TrainConfig):
    """Fine-tune on longer videos with sparse attention (Radial Attention, arXiv 2506.19852, section 4.3).

    Attributes:
        teacher_weight: weight of the match with the dense model without the adapter on a window of the length that it
            was trained at; 0 (default) turns it off.
        teacher_frames: that length in pixel frames.
        rope: stretch the model's positions along time: "interpolation" or "ntk" (Wan; without a teacher, which has its
            own positions). Default: positions run on beyond what the model knows. `vidsparse generate --lora` does the
            same from the file's header; another loader must be told (`vidsparse_pipelines.rope.stretch_time`).
        rope_factor: by how much; default the longest of `num_frames` over `teacher_frames`, in latent frames.
        (all others): as in `TrainConfig`.
    """

    kind: ClassVar[str] = "length-extension"

    teacher_weight: float = 0.0
    teacher_frames: int = 81
    rope: str | None = None
    rope_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_weight < 0:
            raise ConfigError(f"`teacher_weight` must be at least 0, got {self.teacher_weight}.")
        if self.teacher_frames < 1:
            raise ConfigError(f"`teacher_frames` must be at least 1, got {self.teacher_frames}.")
        if self.rope not in (None, *ROPE_KINDS):
            raise ConfigError(f"`rope` must be one of {', '.join(ROPE_KINDS)}, got {self.rope!r}.")
        if self.rope is not None and self.teacher_weight:
            raise ConfigError("`rope` would change the teacher's positions too; set `teacher_weight` to 0.")
        if self.rope_factor is not None and (self.rope is None or not self.rope_factor >= 1):
            raise ConfigError(f"`rope_factor` must be at least 1 and needs `rope`, got {self.rope_factor}.")

    def rope_scaling(self, temporal: int) -> dict[str, Any] | None:
        """Kind and factor for a VAE of `temporal` frames a latent, None where positions stay as they are."""
        if self.rope is None:
            return None
        longest, known = ((n - 1) // temporal + 1 for n in (max(self.num_frames), self.teacher_frames))
        return {"kind": self.rope, "factor": self.rope_factor or max(1.0, longest / known)}


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distil the dense model into a sparse one, at the same number of steps or at fewer.

    Attributes:
        stage: "sparsify": match the dense model's velocity at the same noisy latents; "few-step": match its
            distribution in a few steps (DMD2, arXiv 2405.14867), from prompts alone.
        steps: denoising steps of a few-step student.
        teacher_guidance: guidance scale of the teacher, default 4 in "few-step" and 1 (none) in "sparsify". Above 1 in
            "sparsify" the student learns the guided velocity (guidance distillation, arXiv 2210.03142, section 3.1): it
            needs one forward a step in place of two, and a few-step student may start from it (`init_lora`).
        critic_learning_rate: of the critic's LoRA.
        student_every: the student is updated in every so many-th step, the critic in all.
        (all others): as in `TrainConfig`.
    """

    kind: ClassVar[str] = "distill"

    stage: str = "sparsify"
    steps: int = 4
    teacher_guidance: float | None = None
    critic_learning_rate: float = 2e-4
    student_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise ConfigError(f"`stage` must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        for name in ("steps", "student_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("teacher_guidance", "critic_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be above 0, got {getattr(self, name)}.")

    @property
    def guidance(self) -> float:
        """The teacher's guidance scale."""
        return self.teacher_guidance or (4.0 if is_few_step(self) else 1.0)


def is_few_step(config: TrainConfig) -> bool:
    """Whether the student learns to need few steps, from prompts alone."""
    return isinstance(config, DistillConfig) and config.stage == "few-step"


def few_steps(config: TrainConfig) -> int | None:
    """Denoising steps that the adapter is for, None where it does not matter."""
    return config.steps if isinstance(config, DistillConfig) and is_few_step(config) else None


def without_guidance(config: TrainConfig) -> bool:
    """Whether the student has learned the guided velocity, and is used without guidance."""
    return isinstance(config, DistillConfig) and (is_few_step(config) or config.guidance != 1)


T = TypeVar("T", bound=TrainConfig)


def load_config(cls: type[T], path: str | Path, changes: typing.Sequence[str] = ()) -> T:
    """Read a YAML file and apply `key=value` changes, values in YAML; `method_options.density=0.3` reaches inside.

    Raises:
        ConfigError: one sentence: the file, a name or a value is wrong.
    """
    import yaml

    path = Path(path).expanduser()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The config file {str(path)!r} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The config file {str(path)!r} is not valid YAML ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"The config file {str(path)!r} must hold `name: value` pairs.")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"A change must be written key=value, got {change!r}.")
        name, dot, inner = key.replace("-", "_").partition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of {key!r} is not valid YAML, got {text!r}.") from error
        if dot:
            group = data.get(name)
            data[name] = {**(group if isinstance(group, dict) else {}), inner: value}
        else:
            data[name] = value
    return from_dict(cls, data)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Build a config from plain values.

    Raises:
        ConfigError: a name is unknown or a value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [str(name) for name in data if name not in known]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"`{unknown[0]}` is no setting of {cls.kind}; "
            + (f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}.")
        )
    return cls(**{name: _checked(name, hints[name], value) for name, value in data.items()})


def _checked(name: str, hint: Any, value: Any) -> Any:
    """`value` as the annotated type; lists become tuples, whole numbers floats, one value a list of one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_checked(name, typing.get_args(kind)[0], each) for each in values)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"`{name}` must hold `name: value` pairs, got {value!r}.")
        return dict(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"`{name}` must be {words[kind]}, got {value!r}.")
    return value
