"""A causal language model, with batches and outputs as dictionaries, and -100 where there is nothing to predict.

python language_model.py                  # a minute on a CPU

Texts are drawn from a grammar: after each word one of four may follow. A third of the words that are to be predicted
were typed wrong, any other word in their place. The prompt and the padding are marked -100, as is usual; `ignore_index`
says so to the library. 100 texts without typing errors can be trusted.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin

WORDS, LENGTH, PROMPT, IGNORED = 60, 24, 4, -100


def write_texts(count: int, mistyped: float, seed: int) -> list[dict[str, Tensor]]:
    """Return texts with the words to predict, one place further; prompt and padding have none."""
    grammar = torch.Generator().manual_seed(0)
    followers = torch.rand(WORDS, WORDS, generator=grammar).topk(4).indices
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    for place in range(LENGTH):
        choice = torch.randint(4, (count,), generator=generator)
        words[:, place + 1] = followers[words[:, place], choice]
    labels = words[:, 1:].clone()
    is_wrong = torch.rand(count, LENGTH, generator=generator) < mistyped
    labels[is_wrong] = torch.randint(WORDS, (int(is_wrong.sum()),), generator=generator)
    ends = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=generator)
    labels[:, : PROMPT - 1] = IGNORED
    labels[torch.arange(LENGTH) >= ends] = IGNORED
    return [{"input_ids": x, "labels": y} for x, y in zip(words[:, :-1], labels)]


class LanguageModel(nn.Module):
    """A transformer of one layer, which returns its outputs in a dictionary, as in Hugging Face's libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 64), nn.Embedding(LENGTH, 64)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return logits of shape (N, length, words), and the loss."""
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1], device=x.device)
        logits = self.head(self.layer(x, src_mask=mask, is_causal=True))
        return {"logits": logits, "loss": F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)}


class LitLanguageModel(L.LightningModule):
    """Trains with the loss that the model computes itself."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.model = LanguageModel()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the model's own loss."""
        return self.model(**batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the cross-entropy, in nats for each word."""
        self.log("val_loss", self.model(**batch)["loss"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the cross-entropy, in nats for each word."""
        self.log("test_loss", self.model(**batch)["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class AdaLanguageModel(AdaLFLMixin, LitLanguageModel):
    """The same, trained with a loss that learns; here it is said what a prediction is."""

    def adalfl_predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits of shape (N, words, length), the classes second as in `F.cross_entropy`, and labels."""
        return self.model(**batch)["logits"].transpose(1, 2), batch["labels"]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, and print and return the test losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=600, help="training steps of each run")
    parser.add_argument("--mistyped", type=float, default=0.33, help="share of the training words that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    train = DataLoader(write_texts(2000, args.mistyped, args.seed + 1), 32, shuffle=True)
    trusted = DataLoader(write_texts(100, 0.0, args.seed + 2), 100)
    test = DataLoader(write_texts(500, 0.0, args.seed + 3), 500)

    def fit(kind: type[L.LightningModule], checkpoint: ModelCheckpoint | None = None, **options: Any) -> L.Trainer:
        L.seed_everything(args.seed, verbose=False)
        trainer = L.Trainer(
            max_steps=args.max_steps,
            callbacks=[checkpoint] if checkpoint else [],
            enable_checkpointing=checkpoint is not None,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(kind(**options), train, trusted)
        return trainer

    def loss(trainer: L.Trainer, path: str | None = None) -> float:
        return trainer.test(trainer.lightning_module, test, path, verbose=False)[0]["test_loss"]

    best = ModelCheckpoint(monitor="val_loss")
    own = fit(LitLanguageModel, best)
    # The cross-entropy counts here, so it is the meta-objective; the default cares about the most probable word.
    config = AdaLFLConfig(task="multiclass", task_loss="handcrafted", ignore_index=IGNORED)
    learned = fit(AdaLanguageModel, adalfl=config)
    losses = {
        "own loss, at the end": loss(own),
        "own loss, best checkpoint": loss(own, best.best_model_path or None),
        "with lightning_adalfl": loss(learned),
    }
    print(
        f"\nCross-entropy on 500 test texts after {args.max_steps:,} steps; the grammar itself has {math.log(4):.4f}\n"
    )
    for name, value in losses.items():
        print(f"{name:28}{value:8.4f}")
    return losses


if __name__ == "__main__":
    main()
