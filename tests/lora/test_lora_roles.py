"""One model in three roles: what each computes, whose gradients move, and what gradient checkpointing must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from safetensors.torch import load_file
from torch import Tensor

from vidsparse.errors import ConfigError
from vidsparse_lora.checkpointing import OffloadedCheckpoint
from vidsparse_lora.config import DistillConfig
from vidsparse_lora.distill import sparsify_loss, train
from vidsparse_lora.few_step import FewStep
from vidsparse_lora.objective import (
    add_noise,
    distribution_gradient,
    distribution_loss,
    sample_sigma,
    to_clean,
    window_loss,
)
from vidsparse_lora.roles import CRITIC, STUDENT
from vidsparse_lora.session import Session
from vidsparse_pipelines.lora import read_training

Config = Callable[..., DistillConfig]


def quiet(_: str) -> None:
    pass


def start(config: DistillConfig, critic: bool = False) -> Session:
    session = Session(config, quiet)
    if critic:
        session.add_role(CRITIC, config.critic_learning_rate)
    return session


def randomise(session: Session, role: str, seed: int = 0) -> None:
    """Give a role weights as after some training: `lora_B` starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in session.optimized[role].parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def gradients(session: Session, role: str) -> dict[str, Tensor]:
    optimized = session.optimized[role]
    found = {
        n: p.grad.clone() for n, p in zip(optimized.names, optimized.parameters, strict=True) if p.grad is not None
    }
    for parameter in optimized.parameters:
        parameter.grad = None
    return found


def test_untrained_student_at_density_1_is_the_teacher(distill: Config) -> None:
    full = start(distill(method_options={"density": 1.0, "block_size": 16, "dense_layers": 0}))
    loss = sparsify_loss(full, 0)
    report = full.roles.handle.report()
    assert report.num_sparse_calls == 2 and report.sparse_density == 1.0  # it went through the sparse path
    assert loss.item() < 1e-12
    assert sparsify_loss(start(distill(method="dense", method_options={})), 0).item() == 0.0
    # The same at a lower density, or with a trained adapter, is no zero: the test above could fail.
    assert sparsify_loss(start(distill()), 0).item() > 1e-4
    randomise(full, STUDENT)
    assert sparsify_loss(full, 0).item() > 1e-4


def test_sparsify_with_guidance_learns_the_guided_velocity(distill: Config) -> None:
    """Of an untrained dense student the loss is the guidance's own size, (scale - 1)^2 |v(text) - v(empty)|^2."""
    dense = {"method": "dense", "method_options": {}, "caption_dropout": 0.0}
    losses = {g: sparsify_loss(start(distill(**dense, teacher_guidance=g)), 0).item() for g in (2.0, 3.0)}
    session = start(distill(**dense, teacher_guidance=2.0))
    _, clean, text = session.batch(0)
    sigma = session.sample_sigma(len(clean), session.generator("sigma", 0))
    noisy = session.backbone.add_noise(clean, session.noise(clean.shape, 0), sigma)
    empty = session.backbone.pad_text([session.empty_text] * len(clean))
    velocity = session.backbone.velocity
    expected = (velocity(noisy, sigma, text) - velocity(noisy, sigma, empty)).square().mean().item()
    assert expected > 1e-6
    assert losses[2.0] == pytest.approx(expected, rel=1e-4) and losses[3.0] == pytest.approx(4 * expected, rel=1e-4)
    training = read_training(str(session.save_adapter()))
    assert training is not None and training["guidance_scale"] == 1.0 and training["num_inference_steps"] is None


def test_critic_that_is_the_teacher_gives_no_gradient(distill: Config) -> None:
    session = start(
        distill(stage="few-step", steps=2, teacher_guidance=1.0, gradient_checkpointing=False), critic=True
    )
    randomise(session, STUDENT)
    few = FewStep(session)
    loss, size = few.student_loss(0)
    assert size.item() == 0.0 and loss.item() == 0.0
    loss.backward()
    moved = gradients(session, STUDENT)
    assert moved and all(not g.any() for g in moved.values())
    randomise(session, CRITIC, seed=1)
    loss, size = few.student_loss(0)
    loss.backward()
    assert size.item() > 0 and all(g.any() for n, g in gradients(session, STUDENT).items() if "lora_B" in n)


def test_gradients_never_leak_across_roles(distill: Config) -> None:
    session = start(distill(stage="few-step", steps=2), critic=True)
    randomise(session, STUDENT)
    randomise(session, CRITIC, seed=1)
    few = FewStep(session)
    trained = {id(p) for o in session.optimized.values() for p in o.parameters}
    frozen = [p for p in session.backbone.transformer.parameters() if id(p) not in trained]
    few.student_loss(0)[0].backward()
    assert not gradients(session, CRITIC) and all(p.grad is None for p in frozen)
    assert len(gradients(session, STUDENT)) == len(session.optimized[STUDENT].parameters)
    few.critic_loss(0).backward()
    assert not gradients(session, STUDENT) and all(p.grad is None for p in frozen)
    assert len(gradients(session, CRITIC)) == len(session.optimized[CRITIC].parameters)


def test_each_role_has_its_own_weights_and_attention(distill: Config) -> None:
    session = start(distill(stage="few-step", gradient_checkpointing=False), critic=True)
    text = session.prompt_text(0)
    noisy, sigma = session.noise(session.latent_shape(2), 0), torch.full((2,), 0.5)

    def velocity() -> Tensor:
        with torch.enable_grad():
            return session.backbone.velocity(noisy, sigma, text).detach()

    with session.roles.teacher():
        plain = session.backbone.velocity(noisy, sigma, text)
    session.roles.critic()
    assert torch.equal(velocity(), plain)
    session.roles.student()
    sparse = velocity()
    assert not torch.allclose(sparse, plain, atol=1e-3)
    randomise(session, CRITIC)
    assert torch.equal(velocity(), sparse)  # the critic's weights are not the student's
    session.roles.critic()
    assert not torch.allclose(velocity(), plain, atol=1e-3)
    with session.roles.teacher(then=CRITIC):
        assert torch.equal(session.backbone.velocity(noisy, sigma, text), plain)
    session.roles.handle.remove()
    session.backbone.transformer.disable_adapters()
    with torch.no_grad():
        assert torch.equal(session.backbone.velocity(noisy, sigma, text), plain)  # the model as it came


@pytest.mark.parametrize("method", ["radial", "pooled", "sla"])
def test_checkpointed_gradients_are_plain_gradients(distill: Config, method: str) -> None:
    """Also when the dense teacher ran between the student's forward and its backward pass."""
    options = {"density": 0.5, "dense_layers": 0}
    found = []
    offloaded = OffloadedCheckpoint(least_bytes=0)
    for how in (None, torch.utils.checkpoint.checkpoint, offloaded):
        checkpointed = how is not None
        config = distill(method=method, method_options=options, gradient_checkpointing=checkpointed, lora_dropout=0.3)
        session = start(config)
        if how is offloaded:
            session.backbone.transformer.enable_gradient_checkpointing(how)
        randomise(session, STUDENT)
        torch.manual_seed(5)
        loss = sparsify_loss(session, 0)
        with session.roles.teacher():
            noisy = session.noise(torch.Size((2, 16, 5, 8, 8)), 1)
            session.backbone.velocity(
                noisy, torch.full((2,), 0.3), session.backbone.pad_text([session.empty_text] * 2)
            )
        loss.backward()
        found.append((loss.item(), gradients(session, STUDENT)))
    (plain_loss, plain), *others = found
    assert offloaded.moved == 1, "of two blocks the second one's input depends on weights"
    assert len(plain) == 16 + 4 * (method == "sla")  # two layers; "sla" has a projection with its bias in each
    assert all(g.any() for g in plain.values())
    for loss, checkpointed_gradients in others:
        assert loss == plain_loss and plain.keys() == checkpointed_gradients.keys()
        for name, gradient in plain.items():
            assert torch.equal(gradient, checkpointed_gradients[name]), name


def test_compiled_training_is_eager_training(distill: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    compile_blocks, calls = WanTransformer3DModel.compile_repeated_blocks, []

    def without_inductor(model: Any) -> None:
        calls.append(model)
        compile_blocks(model, backend="aot_eager")

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", without_inductor)
    options = {"density": 0.5, "block_size": 16, "dense_layers": 1}
    files = [
        train(
            distill(max_steps=2, method_options=options, compile=compiled, output_dir=str(tmp_path / str(compiled))),
            quiet,
        )
        for compiled in (False, True)
    ]
    assert len(calls) == 1
    eager, graphs = (load_file(file) for file in files)
    assert all(torch.allclose(graphs[name], eager[name], atol=1e-6) for name in eager)
    for changes, why in (
        ({"stage": "few-step"}, "few-step runs the teacher between"),
        ({"method": "pooled", "method_options": {"density": 0.5}}, "'pooled' selects from query and key"),
    ):
        with pytest.raises(ConfigError, match=f"`compile` cannot be used here: {why}"):
            train(distill(compile=True, output_dir=str(tmp_path / "refused"), **changes), quiet)


def test_targets_that_match_nothing(distill: Config) -> None:
    with pytest.raises(ConfigError, match="`targets` matches no module of WanTransformer3DModel: 'nothing'"):
        start(distill(targets="nothing"))


def test_adapter_is_on_the_video_self_attention_alone(distill: Config) -> None:
    session = start(distill())
    modules = {n.split(".lora_")[0] for n in session.optimized[STUDENT].names}
    assert modules == {f"blocks.{i}.attn1.{n}" for i in range(2) for n in ("to_q", "to_k", "to_v", "to_out.0")}
    assert {p.dtype for p in session.optimized[STUDENT].parameters} == {torch.float32}


# The objectives


def test_noise_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=generator), torch.randn(2, 3, 2, 4, 4, generator=generator)
    sigma = torch.tensor([0.2, 0.9])
    noisy = add_noise(clean, noise, sigma)
    assert torch.allclose(noisy[0], 0.8 * clean[0] + 0.2 * noise[0], atol=1e-6)
    assert torch.allclose(to_clean(noisy, noise - clean, sigma), clean, atol=1e-6)


def test_noise_levels_follow_the_shift() -> None:
    def draw(shift: float, sampling: str) -> Tensor:
        return sample_sigma(4000, shift, sampling, torch.Generator().manual_seed(0))

    assert abs(draw(1, "uniform").mean().item() - 0.5) < 0.02
    assert abs(draw(1, "logit-normal").mean().item() - 0.5) < 0.02
    assert draw(1, "uniform").std() > draw(1, "logit-normal").std() + 0.05
    u = draw(1, "uniform")
    assert torch.allclose(draw(3, "uniform"), 3 * u / (1 + 2 * u))
    assert ((draw(5, "uniform") > 0) & (draw(5, "uniform") < 1)).all()


def test_gradient_of_the_distribution_loss_is_the_gradient_given() -> None:
    generator = torch.Generator().manual_seed(0)
    generated, real, fake = (torch.randn(2, 3, 2, 4, 4, generator=generator) for _ in range(3))
    generated.requires_grad_()
    gradient = distribution_gradient(generated.detach(), real, fake)
    distribution_loss(generated, gradient).backward()
    assert generated.grad is not None
    assert torch.allclose(generated.grad, gradient / gradient.numel(), rtol=1e-4, atol=1e-9)
    spread = (generated.detach() - real)[0].abs().mean()
    assert torch.allclose(gradient[0], (fake - real)[0] / spread)


def test_window_of_the_teacher() -> None:
    student = torch.zeros(1, 1, 6, 1, 1)
    teacher = torch.tensor([3.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)
    assert window_loss(student, teacher, 0).item() == pytest.approx(11 / 3)
    assert window_loss(student, teacher, 2).item() == pytest.approx(1.0)  # its first frame is left out
    student[:, :, 3:5] = 1
    assert window_loss(student, teacher, 2).item() == 0


def test_gaussian_teacher_is_reached() -> None:
    """A student x = a z + b, a teacher with the score of N(2, 0.5²), a critic that knows the student's own score."""
    scale, shift = torch.tensor(1.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def clean_of(noisy: Tensor, sigma: Tensor, mean: Any, spread: Any) -> Tensor:
        """E[x_0 | x_t] for x_0 ~ N(mean, spread²), x_t = (1 - sigma) x_0 + sigma n."""
        sigma = sigma.view(-1, 1, 1, 1, 1)
        gain = (1 - sigma) * spread**2 / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        return mean + gain * (noisy - (1 - sigma) * mean)

    for _ in range(400):
        generated = scale * torch.randn(64, 1, 1, 4, 4, generator=generator) + shift
        sigma = sample_sigma(64, 1.0, "uniform", generator).clamp(0.02, 0.98)
        noisy = add_noise(generated.detach(), torch.randn(generated.shape, generator=generator), sigma)
        real = clean_of(noisy, sigma, 2.0, 0.5)
        fake = clean_of(noisy, sigma, shift.detach(), scale.detach())
        gradient = distribution_gradient(generated.detach(), real, fake)
        optimizer.zero_grad()
        distribution_loss(generated, gradient).backward()
        optimizer.step()
    assert abs(shift.item() - 2.0) < 0.1
    assert abs(abs(scale.item()) - 0.5) < 0.1
