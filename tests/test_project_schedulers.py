"""Schedulers step as in automatic optimization: the traces of learning rates are those of the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from projects import Keep, Plain, RateTrace, config, loaders, make, trainer
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_adalfl import AdaLFLMixin


class OneCycle(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AdaOneCycle(AdaLFLMixin, OneCycle):
    pass


class Plateau(Plain):
    """The plateau is of a constant, so that both runs see the same values."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("constant", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        schedule = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "constant"}}


class AdaPlateau(AdaLFLMixin, Plateau):
    pass


class Several(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        by_step = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step", "frequency": 2}
        by_epoch = {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch", "frequency": 2}
        return [optimizer], [by_step, by_epoch]


class AdaSeveral(AdaLFLMixin, Several):
    pass


class OwnStep(Plain):
    """Steps a scheduler in its own way, and warms up in its own `optimizer_step`."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": LinearLR(optimizer, 0.1, 1.0, 10), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        scheduler.step()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.trainer.global_step < 3:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.trainer.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class AdaOwnStep(AdaLFLMixin, OwnStep):
    pass


KINDS = [(OneCycle, AdaOneCycle), (Plateau, AdaPlateau), (Several, AdaSeveral), (OwnStep, AdaOwnStep)]


def rates(tmp_path: Any, module: Any, epochs: int, ckpt_path: Any = None, **options: Any) -> list[Any]:
    trace = RateTrace()
    callbacks = [trace, *options.pop("callbacks", [])]
    t = trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, **options)
    t.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trace.rates


@pytest.mark.parametrize(("plain", "adaptive"), KINDS)
def test_the_trace_of_rates_equals_that_of_the_plain_module(tmp_path: Any, plain: Any, adaptive: Any) -> None:
    expected = rates(tmp_path, make(plain), 4)
    assert len({str(rate) for _, rate in expected}) > 2
    assert rates(tmp_path, make(adaptive, adalfl=config()), 4) == expected


@pytest.mark.parametrize(("plain", "adaptive"), KINDS)
def test_the_trace_goes_on_after_a_resume(tmp_path: Any, plain: Any, adaptive: Any) -> None:
    traces = {}
    for kind, arguments in ((plain, {}), (adaptive, {"adalfl": config()})):
        keep = Keep(tmp_path / kind.__name__)
        whole = rates(tmp_path, make(kind, **arguments), 4, callbacks=[keep])
        resumed = rates(tmp_path, make(kind, **arguments), 4, keep.folder / "epoch=1.ckpt")
        traces[kind] = (whole, resumed)
    assert traces[adaptive] == traces[plain]
    whole, resumed = traces[adaptive]
    assert len(resumed) == 14  # two epochs of six batches
    # A plateau's epoch ends after its checkpoint is written, in Lightning itself.
    assert plain is Plateau or resumed == whole[-14:]


def test_a_plateau_of_the_validation_loss_lowers_the_rate_as_for_the_plain_module(tmp_path: Any) -> None:
    class OnLoss(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=3.0)
            schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    class AdaOnLoss(AdaLFLMixin, OnLoss):
        pass

    expected = rates(tmp_path, make(OnLoss), 5)
    assert expected[-1] != expected[0]
    # The task loss itself, so that the validation losses are the same too.
    assert rates(tmp_path, make(AdaOnLoss, adalfl=config(learn="lr", online=False)), 5) == expected


def test_a_learned_rate_multiplies_the_schedule_and_leaves_it_alone(tmp_path: Any) -> None:
    expected = rates(tmp_path, make(Several), 3)
    module = make(AdaSeveral, adalfl=config(learn="lr", lr_meta_lr=0.05))
    assert rates(tmp_path, module, 3) == expected
    assert not torch.isclose(torch.tensor(module.adalfl.lr_scale), torch.tensor(1.0), atol=0.05)
