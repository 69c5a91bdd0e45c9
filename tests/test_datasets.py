from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path

import datasets_images
import datasets_tabular
import numpy as np
import pytest
import torch
from dataset_files import crime_table, generator, stacked, write_cifar, write_idx, write_svhn
from sklearn.utils import Bunch
from tasks import TASKS, Task, in_order, load_task
from torchvision.transforms import v2


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("sklearn.datasets._openml.urlopen", refuse)


def sizes(task: Task) -> tuple[int, int, int]:
    return len(task.train), len(task.val), len(task.test)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with every image set in it, whose check sums torchvision is told."""
    root = tmp_path_factory.mktemp("root")
    write_idx(root / "MNIST" / "raw", compress=False)
    write_idx(root / "FashionMNIST" / "raw", compress=True)
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(root, patch, classes=10, count=40)
        write_cifar(root, patch, classes=100, count=1000)
        write_svhn(root, patch)
        yield root


@pytest.fixture
def made(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That root, and small tables from the fetchers."""
    monkeypatch.setattr(datasets_images, "DEBIAN_FASHION_MNIST", files / "absent")
    monkeypatch.setattr(datasets_tabular, "fetch_openml", lambda **kwargs: crime_table())
    houses = generator().lognormal(size=(500, 8)), generator().random(500) * 5
    monkeypatch.setattr(datasets_tabular, "fetch_california_housing", lambda **kwargs: houses)
    pixels, labels = generator().integers(0, 256, (5000, 784)).astype(float), np.repeat(np.arange(10), 500)
    monkeypatch.setattr(datasets_images, "mnist_data", lambda: (pixels, labels))
    return files


EXPECTED = {
    # name: (sizes of train, val and test; shape of x; outputs)
    "crime": ((144, 16, 40), (5,), 1),
    "diabetes": ((317, 36, 89), (10,), 1),
    "california": ((360, 40, 100), (8,), 1),
    "mnist": ((180, 20, 50), (1, 28, 28), 10),
    "mnist5k": ((3600, 400, 1000), (1, 28, 28), 10),
    "fashion_mnist": ((180, 20, 50), (1, 28, 28), 10),
    "cifar10": ((180, 20, 40), (3, 32, 32), 10),
    "cifar100": ((900, 100, 1000), (3, 32, 32), 100),
    "svhn": ((180, 20, 30), (3, 32, 32), 10),
}


def test_every_task_is_expected_here() -> None:
    assert list(EXPECTED) == list(TASKS)


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_shapes_and_types(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    expected_sizes, inputs, outputs = EXPECTED[name]
    assert (sizes(task), task.inputs, task.outputs) == (expected_sizes, inputs, outputs)
    for part in (task.train, task.val, task.test):
        x, y = next(iter(in_order(part, 8)))
        assert x.shape == (8, *inputs)
        assert x.dtype == torch.float32
        assert x.isfinite().all()
        if task.kind == "regression":
            assert (y.shape, y.dtype) == ((8, 1), torch.float32)
        else:
            assert (y.shape, y.dtype) == ((8,), torch.int64)
            assert 0 <= int(y.min()) <= int(y.max()) < outputs


@pytest.mark.parametrize("name", ["diabetes", "mnist5k", "fashion_mnist", "cifar10", "svhn"])
def test_the_seed_decides_the_split(name: str, made: Path) -> None:
    """Equal seeds, equal parts; another seed, another validation part."""

    def validation(seed: int) -> torch.Tensor:
        task = load_task(name, made, seed)
        torch.manual_seed(0)  # for the random crops and flips
        return stacked(task.val)[0]

    torch.testing.assert_close(validation(0), validation(0), rtol=0, atol=0)
    assert not torch.allclose(validation(0), validation(1))


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10"])
def test_an_original_test_set_stays_whole_whatever_the_seed(name: str, made: Path) -> None:
    """Labels in the order of the file; pixels up to the normalisation, which follows the training part."""
    (x0, y0), (x1, y1) = (stacked(load_task(name, made, seed).test) for seed in (0, 1))
    torch.testing.assert_close(y0, y1, rtol=0, atol=0)
    torch.testing.assert_close(x0, x1, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["mnist", "mnist5k", "fashion_mnist"])
def test_validation_has_a_tenth_of_each_class(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    counts = torch.bincount(stacked(task.val)[1], minlength=10)
    assert (counts == sizes(task)[1] // 10).all()


def test_parts_do_not_overlap(made: Path) -> None:
    """Diabetes has no two equal patients, so no row may come back after it was scaled."""
    task = load_task("diabetes", made, seed=0)
    rows = torch.cat([stacked(part)[0] for part in (task.train, task.val, task.test)])
    assert len(rows) == 442
    assert len(rows.unique(dim=0)) == 442


@pytest.mark.parametrize("name", ["crime", "diabetes", "california"])
def test_regression_scalers_see_the_training_part_alone(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    x, y = stacked(task.train)
    torch.testing.assert_close(x.mean(0), torch.zeros(task.inputs), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(task.inputs), rtol=1e-4, atol=0)
    assert (y.min().item(), y.max().item()) == pytest.approx((0, 1))
    assert stacked(task.test)[0].mean(0).abs().max() > 1e-3


def test_other_rows_do_not_change_the_training_part() -> None:
    """Spoiling every validation and test row must leave the scaled training rows as they were."""
    random = generator()
    x, y = random.normal(size=(100, 3)), random.normal(size=100)
    train = stacked(datasets_tabular.regression_splits(x, y, seed=0)[0])
    rows = datasets_tabular.train_test_split(np.arange(100), test_size=0.2, random_state=0)[0]
    rows = datasets_tabular.train_test_split(rows, test_size=0.1, random_state=0)[0]
    others = np.setdiff1d(np.arange(100), rows)
    x[others], y[others] = 1e6, -1e6
    spoiled = stacked(datasets_tabular.regression_splits(x, y, seed=0)[0])
    torch.testing.assert_close(spoiled, train, rtol=0, atol=0)


def test_a_gap_gets_the_training_median() -> None:
    """Feature values 0 to 98 and one gap: in the training part, the gap lies where the median lies."""
    x = np.arange(100, dtype=float)[:, None]
    x[0] = np.nan
    splits = datasets_tabular.regression_splits(x, np.arange(100, dtype=float), seed=0)
    values, targets = (torch.cat(parts) for parts in zip(*(stacked(part) for part in splits)))
    train_values, train_targets = stacked(splits[0])
    known = train_values[train_targets != targets.min()]
    gap = values[targets.argmin()]
    assert known.quantile(0.5).item() == pytest.approx(gap.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["mnist", "mnist5k", "fashion_mnist"])
def test_grey_images_are_normalised_by_the_training_part(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    x, _ = stacked(task.train)
    # Tight enough to tell the training part's mean and deviation from those of training and validation together.
    assert (x.double().mean().item(), x.double().std(correction=0).item()) == pytest.approx((0, 1), abs=1e-5)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_colour_images_are_normalised_by_channel(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    # Without the crop and the flip the training part shows its own statistics.
    crop, flip, *normalise = task.train.dataset.transform.transforms  # type: ignore[attr-defined]
    assert isinstance(crop, v2.RandomCrop)
    assert isinstance(flip, v2.RandomHorizontalFlip)
    task.train.dataset.transform = v2.Compose(normalise)  # type: ignore[attr-defined]
    x = stacked(task.train)[0].double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_training_and_validation_are_augmented_and_the_test_is_not(name: str, made: Path) -> None:
    task = load_task(name, made, seed=0)
    for part, varies in ((task.train, True), (task.val, True), (task.test, False)):
        torch.manual_seed(0)
        views = torch.stack([part[0][0] for _ in range(12)])
        assert (views != views[0]).any().item() is varies


def test_svhn_calls_the_digit_zero_zero(made: Path) -> None:
    assert stacked(load_task("svhn", made, seed=0).test)[1][:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_fashion_mnist_is_read_from_the_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "usr" / "share" / "datasets" / "fashion-mnist"
    write_idx(package, compress=True)
    monkeypatch.setattr(datasets_images, "DEBIAN_FASHION_MNIST", package)
    task = load_task("fashion_mnist", tmp_path / "root", seed=0)
    assert sizes(task) == (180, 20, 50)
    assert sorted(file.suffix for file in package.iterdir()) == [".gz"] * 4, "the package's folder must stay as it is"


def test_compressed_and_plain_idx_files_are_the_same(tmp_path: Path) -> None:
    for folder, compress in (("plain", False), ("compressed", True)):
        write_idx(tmp_path / folder / "MNIST" / "raw", compress)
    plain, compressed = (stacked(load_task("mnist", tmp_path / folder, 0).train) for folder in ("plain", "compressed"))
    torch.testing.assert_close(plain, compressed, rtol=0, atol=0)


def test_mnist5k_and_diabetes_are_the_real_thing_without_a_network(tmp_path: Path) -> None:
    digits = load_task("mnist5k", tmp_path, seed=0)
    assert sizes(digits) == (3600, 400, 1000)
    x, _ = stacked(digits.train)
    assert x.min().item() == pytest.approx(-0.424, abs=0.02)  # -0.1307 / 0.3081, the constants known for MNIST
    assert (x == x.min()).float().mean() > 0.7, "most of a digit is background"
    diabetes = load_task("diabetes", tmp_path, seed=0)
    targets = torch.cat([stacked(part)[1] for part in (diabetes.train, diabetes.val, diabetes.test)])
    assert targets.var().item() == pytest.approx(0.0575, abs=0.002)
    assert list(tmp_path.iterdir()) == []


def test_crime_keeps_what_predicts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven columns the keys go, and the one that most communities lack; a gap among nominal numbers is one."""
    given: list[np.ndarray] = []
    split = datasets_tabular.regression_splits
    monkeypatch.setattr(
        datasets_tabular, "regression_splits", lambda x, y, seed: [given.append(x), split(x, y, seed)][-1]
    )
    load_task("crime", made, seed=0)
    kept = crime_table().frame[["population", "racePctWhite", "medIncome", "PctKids", "OtherPerCap"]]
    np.testing.assert_array_equal(given[0], kept.astype(object).replace("?", np.nan).to_numpy(float))
    assert np.isnan(given[0]).sum() == 1


def test_crime_is_the_same_from_a_file(made: Path, tmp_path: Path) -> None:
    crime_table().frame.to_csv(tmp_path / "communities.csv", index=False)
    for part in ("train", "val", "test"):
        file, openml = (stacked(getattr(load_task("crime", root, seed=0), part)) for root in (tmp_path, made))
        torch.testing.assert_close(file, openml)


def test_crime_and_california_are_kept_under_the_root(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, object]] = {}

    def openml(**kwargs: object) -> Bunch:
        asked["crime"] = kwargs
        return crime_table()

    def houses(**kwargs: object) -> tuple[np.ndarray, np.ndarray]:
        asked["california"] = kwargs
        return generator().random((100, 8)), generator().random(100)

    monkeypatch.setattr(datasets_tabular, "fetch_openml", openml)
    monkeypatch.setattr(datasets_tabular, "fetch_california_housing", houses)
    for name in ("crime", "california"):
        load_task(name, made, seed=0)
    assert asked["crime"] == {"data_id": 42730, "data_home": made, "as_frame": True}
    assert asked["california"] == {"data_home": made, "return_X_y": True}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mnist", r"four idx files, plain or \.gz, in `MNIST/raw/`"),
        ("fashion_mnist", r"`apt-get install dataset-fashion-mnist`"),
        ("cifar10", r"`cifar-10-python\.tar\.gz`"),
        ("cifar100", r"`cifar-100-python\.tar\.gz`"),
        ("svhn", r"`train_32x32\.mat` and `test_32x32\.mat`"),
    ],
)
def test_missing_images_say_how_to_get_them(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets_images, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(RuntimeError, match=rf"(?s)task '{name}' can neither be read .*no network here.*{where}"):
        load_task(name, tmp_path, seed=0)


@pytest.mark.parametrize(
    ("name", "where"), [("crime", r"`communities\.csv`.*OpenML's cache"), ("california", "`cal_housing_py3.pkz`")]
)
@pytest.mark.filterwarnings("ignore:A network error occurred:UserWarning", "ignore:Retry downloading:UserWarning")
def test_missing_tables_say_how_to_get_them(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # scikit-learn waits between its three attempts
    with pytest.raises(RuntimeError, match=rf"task '{name}' can neither be read .*no network here.*{where}"):
        load_task(name, tmp_path, seed=0)


def test_unknown_name_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`name` must be one of 'crime', .*'svhn'; got 'imagenet'"):
        load_task("imagenet", tmp_path, seed=0)
