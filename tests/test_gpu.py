"""On an accelerator: precisions, random states, memory, and no waiting of the host for the device."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from projects import adaptive, assert_same, make, tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50

from lightning_adalfl import AdaLFLConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES = 10


class Net(L.LightningModule):
    """A small convolutional network with BatchNorm and dropout."""

    def __init__(self, classes: int = CLASSES, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(memory_format=torch.channels_last) if self.channels_last else x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Attention(Net):
    """A transformer layer with dropout in its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x.flatten(2)[:, :, :32]).mean(1))


def data(size: int, classes: int = CLASSES) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 16, 16, generator=generator)
    return TensorDataset(x, torch.randint(classes, (size,), generator=generator))


def fit(tmp_path: Any, module: Any, steps: int = 12, callbacks: Any = (), **options: Any) -> L.Trainer:
    torch.manual_seed(1)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    classes = getattr(getattr(module, "head", None) or module.net[-1], "out_features", CLASSES)
    trainer.fit(module, DataLoader(data(256, classes), 32, shuffle=True), DataLoader(data(64, classes), 32))
    return trainer


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"precision": "16-mixed"}], ids=str)
@pytest.mark.parametrize("kind", [Net, Attention])
def test_watching_leaves_training_as_it_is_to_the_bit(tmp_path: Any, options: Any, kind: Any) -> None:
    plain = make(kind)
    fit(tmp_path, plain, **options)
    way = "finite_difference" if kind is Attention else "reverse"  # fused attention draws its dropout by itself
    watched = make(adaptive(kind), adalfl=AdaLFLConfig("multiclass", learn="nothing", meta_every=1, hypergradient=way))
    fit(tmp_path, watched, **options)
    assert_same(tensors(watched), tensors(plain))
    assert watched.adalfl.meta_steps > 5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_learns_in_every_precision(tmp_path: Any, precision: str, way: str, channels_last: bool) -> None:
    config = AdaLFLConfig("multiclass", meta_every=1, meta_lr=1e-2, hypergradient=way)
    module = make(adaptive(Net), channels_last=channels_last, adalfl=config)
    fit(tmp_path, module, precision=precision)
    learner = module.adalfl
    assert learner.meta_steps >= 10
    assert float(learner.scalars["adalfl/skipped_meta_steps"]) == 0
    assert all(torch.isfinite(p).all() for p in learner.learned.values())
    assert float(learner.loss.linear[-1].weight.detach().abs().max()) > 0


@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
def test_a_deep_network_whose_kernels_round_to_ten_bits_can_be_run_again(tmp_path: Any, way: str) -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Upsample(64), resnet50(num_classes=CLASSES))
            self.head = self.net[1].fc

    config = AdaLFLConfig("multiclass", meta_every=1, hypergradient=way)
    module = make(adaptive(Deep), adalfl=config)
    fit(tmp_path, module)
    assert module.adalfl.meta_steps >= 10


def test_the_ways_to_the_hypergradient_agree_on_the_device(tmp_path: Any) -> None:
    found = {}
    for way in ("forward", "reverse", "finite_difference"):
        config = AdaLFLConfig("multiclass", meta_every=1, meta_lr=1e-2, hypergradient=way)
        module = make(adaptive(Net), adalfl=config).double()
        fit(tmp_path, module, steps=2, precision="64-true")
        found[way] = torch.cat([p.detach().flatten().cpu() for p in module.adalfl.learned.values()])
    torch.testing.assert_close(found["forward"], found["reverse"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["finite_difference"], found["reverse"], rtol=1e-2, atol=1e-4)


def test_dropout_in_fused_attention_is_refused_where_it_cannot_be_drawn_again(tmp_path: Any) -> None:
    """The remedy of the message works."""
    with pytest.raises(ValueError, match="or in fused attention on an accelerator"):
        fit(tmp_path, make(adaptive(Attention), adalfl=AdaLFLConfig("multiclass", meta_every=1)))
    config = AdaLFLConfig("multiclass", meta_every=1, hypergradient="finite_difference")
    module = make(adaptive(Attention), adalfl=config)
    fit(tmp_path, module)
    assert module.adalfl.meta_steps > 5


@pytest.fixture
def _waiting_is_allowed_afterwards() -> Any:
    yield
    torch.cuda.set_sync_debug_mode("default")


class NoWaiting(L.Callback):
    """Raises where the host waits for the device, in the steps from the second meta step on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.watched = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.first:
            torch.cuda.set_sync_debug_mode("error")
            self.watched += 1

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.usefixtures("_waiting_is_allowed_afterwards")
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_logs_nothing_does_not_wait_for_the_device(tmp_path: Any, classes: int, optimizer: Any) -> None:
    class Pinned(Net):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=1e-3)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return tuple(part.pin_memory().to(device, non_blocking=True) for part in batch)

    watch = NoWaiting(first=4)
    module = make(adaptive(Pinned), classes=classes, adalfl=AdaLFLConfig("multiclass", meta_every=2))
    fit(tmp_path, module, steps=10, callbacks=[watch], log_every_n_steps=1000)
    assert watch.watched == 6
    assert module.adalfl.meta_steps == 5


def test_a_step_of_many_classes_takes_little_memory(tmp_path: Any) -> None:
    peaks = []
    for kind, arguments in ((Net, {}), (adaptive(Net), {"adalfl": AdaLFLConfig("multiclass", meta_every=1)})):
        module = make(kind, classes=8000, **arguments)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        fit(tmp_path, module, steps=4)
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
        del module
    assert peaks[1] - peaks[0] < 400, peaks


def test_random_numbers_of_the_device_are_left_alone(tmp_path: Any) -> None:
    states = []
    for kind, arguments in ((Net, {}), (adaptive(Net), {"adalfl": AdaLFLConfig("multiclass", meta_every=1)})):
        fit(tmp_path, make(kind, **arguments))
        states.append((torch.get_rng_state(), torch.cuda.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(*states))
