"""Batches as dictionaries and outputs as objects, as in Hugging Face's libraries: override `adalfl_predict`.

python examples/dict_batches.py --steps 300
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger

WORDS, LENGTH = 50, 12


@dataclass
class Output:
    """What the model returns."""

    logits: Tensor
    loss: Tensor | None = None


class Sentences(Dataset[dict[str, Tensor]]):
    """Random sentences; the label says whether the first half has the larger words."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(WORDS, (count, LENGTH), generator=generator)
        halves = self.words.view(count, 2, LENGTH // 2).sum(-1)
        self.labels = (halves[:, 0] > halves[:, 1]).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


class Transformer(nn.Module):
    """A one-layer encoder with a classification head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        """Return logits (N, 2), and the loss where labels are given."""
        logits = self.head(self.encoder(self.embedding(input_ids) + self.position).mean(1))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


class LitTransformer(L.LightningModule):
    """Trains with the loss that the model computes itself."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Transformer()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """Log and return the model's own loss."""
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the error rate."""
        predicted = self.model(**batch).logits.argmax(1)
        self.log("val_error", (predicted != batch["labels"]).float().mean())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the error rate."""
        predicted = self.model(**batch).logits.argmax(1)
        self.log("test_error", (predicted != batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class AdaTransformer(AdaLFLMixin, LitTransformer):
    """The same with a loss that learns; only here is it said what a prediction is."""

    def adalfl_predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and labels."""
        return self.model(**batch).logits, batch["labels"]


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    args = parser.parse_args()

    L.seed_everything(0)
    train, val, test = (
        DataLoader(Sentences(n, seed), 64, shuffle=seed == 0) for seed, n in enumerate((4000, 500, 1000))
    )
    model = AdaTransformer(adalfl=AdaLFLConfig(task="multiclass"))
    trainer = L.Trainer(
        max_steps=args.steps,
        log_every_n_steps=10,
        enable_checkpointing=False,
        callbacks=[AdaLFLInit(steps=args.init_steps), LossShapeLogger(every_n_steps=20)],
    )
    trainer.fit(model, train, val)
    trainer.test(model, test)


if __name__ == "__main__":
    main()
