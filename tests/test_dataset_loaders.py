from __future__ import annotations

from pathlib import Path

import torch
from dataset_files import stacked
from tasks import load_task, loaders


def test_batches_follow_the_seed_and_nothing_else(tmp_path: Path) -> None:
    task = load_task("diabetes", tmp_path, seed=0)

    def two_epochs(seed: int, other_draws: int) -> torch.Tensor:
        train = loaders(task, batch_size=32, seed=seed).train
        batches = []
        for _ in range(2):
            for x, _ in train:
                torch.rand(other_draws)  # what a method draws between batches must not matter
                batches.append(x)
        return torch.cat(batches)

    first = two_epochs(seed=0, other_draws=0)
    torch.testing.assert_close(two_epochs(seed=0, other_draws=5), first, rtol=0, atol=0)
    assert not torch.equal(first[:317], first[317:]), "the second epoch is shuffled anew"
    assert not torch.equal(two_epochs(seed=1, other_draws=0), first)


def test_loaders_give_every_instance_once_and_keep_the_order_of_the_others(tmp_path: Path) -> None:
    task = load_task("diabetes", tmp_path, seed=0)
    made_loaders = loaders(task, batch_size=100)
    assert [len(x) for x, _ in made_loaders.train] == [100, 100, 100, 17]
    train = torch.cat([x for x, _ in made_loaders.train])
    torch.testing.assert_close(train.unique(dim=0), stacked(task.train)[0].unique(dim=0), rtol=0, atol=0)
    for loader, part in ((made_loaders.val, task.val), (made_loaders.test, task.test)):
        torch.testing.assert_close(torch.cat([x for x, _ in loader]), stacked(part)[0], rtol=0, atol=0)
        assert loader.num_workers == 0
    assert loaders(task).train.batch_size == 128
