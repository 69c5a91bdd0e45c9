"""The Trainer's gradient clipping is honoured, and the hypergradient passes through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, learned_tensors, loaders, make, trainer
from torch.optim import SGD, Optimizer

from lightning_adalfl import AdaLFLMixin

BY_NORM = {"gradient_clip_val": 0.05}
BY_VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


class GradientNorms(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("clipping", [BY_NORM, BY_VALUE])
def test_clipped_steps_are_those_of_the_plain_module_in_a_second_fit_too(tmp_path: Any, clipping: Any) -> None:
    traces = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": INERT})):
        module = make(kind, **arguments)
        norms = GradientNorms()
        t = trainer(tmp_path, callbacks=[norms], **clipping)
        t.fit(module, *loaders())
        t.fit_loop.max_epochs += 1
        t.fit(module, *loaders())
        traces.append((norms.norms, base_tensors(module)))
    assert traces[0][0] == traces[1][0]
    assert max(traces[0][0]) <= (0.0501 if clipping is BY_NORM else 0.01 * 163**0.5)  # 163 parameters
    assert_same(traces[0][1], traces[1][1])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("clipping", [BY_NORM, BY_VALUE])
def test_the_hypergradient_of_a_clipped_step_is_that_of_the_unrolled_one(
    tmp_path: Any, clipping: Any, optimizer: str
) -> None:
    class Double(Ada):
        def configure_optimizers(self) -> Optimizer:
            return getattr(torch.optim, optimizer)(self.model.parameters(), lr=0.05)

    def learned(method: str, **options: Any) -> dict[str, torch.Tensor]:
        # A meta optimizer that is linear in the hypergradient, so that an error in its size shows too.
        module = make(Double, adalfl=config(hypergradient=method, meta_optimizer="SGD", meta_lr=0.1))
        trainer(tmp_path, precision="64-true", max_epochs=1, **options).fit(module, *loaders(dtype=torch.float64))
        assert module.adalfl.meta_steps == 6
        return learned_tensors(module)

    reference = learned("reverse", **clipping)
    for name, value in learned("forward", **clipping).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-6, atol=1e-9)
    unclipped = learned("forward")
    assert any(not torch.allclose(unclipped[name], reference[name], rtol=1e-4) for name in reference)


class ClipsHead(Plain):
    """Clips in a way of its own: tighter from epoch to epoch."""

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.5)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.calls = [*getattr(self, "calls", []), (gradient_clip_val, gradient_clip_algorithm)]
        self.clip_gradients(optimizer, 0.1 / (1 + self.current_epoch), "norm")


class AdaClipsHead(AdaLFLMixin, ClipsHead):
    pass


def test_a_users_own_clipping_is_called_and_accounted_for(tmp_path: Any) -> None:
    def run(module: Any, **options: Any) -> Any:
        trainer(tmp_path, **options).fit(module, *loaders(dtype=torch.float64))
        assert module.calls == [(None, None)] * 12
        return module

    double = {"precision": "64-true"}
    plain = base_tensors(run(make(ClipsHead), **double))
    assert_same(plain, base_tensors(run(make(AdaClipsHead, adalfl=INERT), **double)))
    options = {"meta_optimizer": "SGD", "meta_lr": 0.1}
    forward, reverse = (
        learned_tensors(run(make(AdaClipsHead, adalfl=config(hypergradient=method, **options)), **double))
        for method in ("forward", "reverse")
    )
    for name, value in forward.items():
        torch.testing.assert_close(value, reverse[name], rtol=1e-6, atol=1e-9)


def test_nothing_is_clipped_where_the_bound_is_not_reached(tmp_path: Any) -> None:
    free = make(Ada, adalfl=config())
    trainer(tmp_path).fit(free, *loaders())
    bounded = make(Ada, adalfl=config())
    trainer(tmp_path, gradient_clip_val=1e4).fit(bounded, *loaders())
    assert_same(base_tensors(free), base_tensors(bounded))
    for name, value in learned_tensors(free).items():
        torch.testing.assert_close(value, learned_tensors(bounded)[name])
