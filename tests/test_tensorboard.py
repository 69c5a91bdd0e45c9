"""TensorBoard as a user meets it: a real server, and a real browser that looks at the page."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossShapeLogger

SCALARS = {"adalfl/learned_loss", "adalfl/task_loss", "adalfl/meta_grad_norm", "adalfl/implied_lr"}
IMAGES = {"adalfl/loss_shape", "adalfl/loss_heatmap"}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,3000"
)


class Regressor(L.LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_error", F.mse_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class AdaRegressor(AdaLFLMixin, Regressor):
    pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("logs")
    train_into(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: fetched(f"{url}/data/plugin/images/tags"), 60)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def train_into(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    data = TensorDataset(x, x.sum(1, keepdim=True) / 4)
    trainer = L.Trainer(
        max_steps=30,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="run"),
        callbacks=[LossShapeLogger(every_n_steps=5, figure_every=10)],
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = AdaRegressor(adalfl=AdaLFLConfig(task="regression", meta_lr=1e-3))
    trainer.fit(model, DataLoader(data, 32), DataLoader(data, 32))


def fetched(url: str) -> dict | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer) or None
    except OSError:
        return None


def wait_until(ready, seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := ready():
            return result
        time.sleep(0.5)
    raise TimeoutError(f"not ready after {seconds} seconds")


@pytest.mark.slow
def test_the_server_serves_scalars_figures_and_hyperparameters(server: str) -> None:
    (scalars,) = fetched(f"{server}/data/plugin/scalars/tags").values()
    assert set(scalars) >= SCALARS
    (images,) = fetched(f"{server}/data/plugin/images/tags").values()
    assert set(images) >= IMAGES
    assert "hparams" in fetched(f"{server}/data/plugins_listing")


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_a_browser_shows_the_figure_and_the_scalars(server: str) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    browser = webdriver.Chrome(service=Service(DRIVER), options=options)
    try:
        browser.get(f"{server}/#timeseries")
        # A card's heading splits its tag over two lines.
        headings = {tag.removeprefix("adalfl") for tag in SCALARS | IMAGES}
        wait_until(lambda: all(heading in text_of(browser) for heading in headings), 90)
        widths = wait_until(lambda: image_widths(browser), 30)
        assert max(widths) > 300, "the figure was not drawn"
    finally:
        browser.quit()


def text_of(browser) -> str:
    return browser.execute_script("return document.body.innerText")


def image_widths(browser) -> list[int]:
    widths = browser.execute_script("return [...document.querySelectorAll('img')].map(i => i.naturalWidth)")
    return [width for width in widths if width > 0]
