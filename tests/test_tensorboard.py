"""TensorBoard as a user meets it: a real server, and a real browser that looks at the page."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from projects import adaptive, make, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, LossShapeLogger

SCALARS = {f"adalfl/{name}" for name in ("learned_loss", "task_loss", "meta_grad_norm", "implied_lr", "flatness")}
IMAGES = {"adalfl/loss_shape", "adalfl/loss_heatmap"}
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,3000"
)
pytestmark = pytest.mark.slow


class Regressor(L.LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Linear(3, 1)

    def forward(self, x: Any) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_error", F.mse_loss(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("logs")
    x = torch.randn(256, 3)
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True) / 4), 32)
    logger, callbacks = TensorBoardLogger(folder, name="run"), [LossShapeLogger(every_n_steps=5, figure_every=10)]
    runner = trainer(folder, max_steps=30, max_epochs=None, logger=logger, callbacks=callbacks, log_every_n_steps=2)
    runner.fit(make(adaptive(Regressor), adalfl=AdaLFLConfig("regression", meta_every=1)), data, data)
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


def fetched(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer) or None
    except OSError:
        return None


def wait_until(ready: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := ready():
            return result
        time.sleep(0.5)
    raise TimeoutError(f"not ready after {seconds} seconds")


def test_the_server_serves_scalars_figures_and_hyperparameters(server: str) -> None:
    (scalars,) = fetched(f"{server}/data/plugin/scalars/tags").values()
    assert set(scalars) >= SCALARS
    (images,) = fetched(f"{server}/data/plugin/images/tags").values()
    assert set(images) >= IMAGES
    assert "hparams" in fetched(f"{server}/data/plugins_listing")


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
        text = "return document.body.innerText"
        wait_until(lambda: all(heading in browser.execute_script(text) for heading in headings), 90)
        widths = "return [...document.querySelectorAll('img')].map(i => i.naturalWidth).filter(w => w > 0)"
        assert max(wait_until(lambda: browser.execute_script(widths), 30)) > 300, "the figure was not drawn"
    finally:
        browser.quit()
