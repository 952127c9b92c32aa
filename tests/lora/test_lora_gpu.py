"""Training on a GPU: through fast kernels, with the CPU's gradients, and exactly resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidsparse_lora import length_extension
from vidsparse_lora.config import DistillConfig, LengthExtensionConfig
from vidsparse_lora.distill import sparsify_loss
from vidsparse_lora.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def quiet(_: str) -> None:
    pass


def test_sparse_training_takes_a_fast_kernel(distill: Callable[..., DistillConfig]) -> None:
    session = Session(distill(device="cuda"), quiet)
    sparsify_loss(session, 0).backward()
    report = session.roles.handle.report()
    assert report.num_sparse_calls == 2 and report.sparse_density is not None and report.sparse_density < 1
    assert not [note for note in report.notes if "slow backend" in note]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in session.optimized["student"].parameters)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_kernels_are_those_of_the_reference(
    distill: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    """float32, the same session on the same GPU, through the kernels and through plain torch."""
    import vidsparse.attention as attention

    session = Session(distill(device="cuda", gradient_checkpointing=checkpointed), quiet)
    generator = torch.Generator().manual_seed(0)
    for parameter in session.optimized["student"].parameters:
        parameter.data.copy_((torch.randn(parameter.shape, generator=generator) * 0.2).cuda())

    def gradients() -> list[torch.Tensor]:
        sparsify_loss(session, 0).backward()
        found = [p.grad for p in session.optimized["student"].parameters if p.grad is not None]
        for parameter in session.optimized["student"].parameters:
            parameter.grad = None
        return found

    fast = gradients()
    original = attention.block_sparse_attention
    monkeypatch.setattr(
        attention,
        "block_sparse_attention",
        lambda *args, **options: original(*args, **{**options, "backend": "reference"}),
    )
    plain = gradients()
    assert len(fast) == len(plain) == 16
    for found, expected in zip(fast, plain, strict=True):
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_run_goes_on_exactly(
    lengthen: Callable[..., LengthExtensionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "ema": 0.9, "lora_dropout": 0.1, "deterministic": True}
    whole = length_extension.train(lengthen(**options, output_dir=str(tmp_path / "whole")), quiet)

    class Killed(BaseException):
        pass

    original = Session.update

    def update(self: Session, role: str) -> torch.Tensor:
        if self.step == 3:
            raise Killed
        return original(self, role)

    monkeypatch.setattr(Session, "update", update)
    config = lengthen(**options, output_dir=str(tmp_path / "parts"))
    with pytest.raises(Killed):
        length_extension.train(config, quiet)
    monkeypatch.setattr(Session, "update", original)
    parts = length_extension.train(config, quiet)
    expected, found = load_file(whole), load_file(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
