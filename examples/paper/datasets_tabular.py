"""The regression tasks: Communities and Crime, Diabetes, California Housing.

None has an original test set: 20% are split off as one, then 10% of the rest for validation. Features are standardised
and targets min-max scaled to [0, 1], both as the training part alone says, so other targets may lie a little outside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from in_memory import InMemory
from numpy.typing import NDArray
from sklearn.datasets import fetch_california_housing, fetch_openml, load_diabetes
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

Array = NDArray[Any]
CRIME_OPENML_ID = 42730
CRIME_TARGET = "ViolentCrimesPerPop"
# Named non-predictive by the data set's own description: where a community is, and a fold of cross-validation.
CRIME_NOT_PREDICTIVE = ["state", "county", "community", "communityname", "fold"]


def crime(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """Communities and Crime (Redmond, 2009): 1,994 communities.

    Read from ``communities.csv`` under `root` if it is there, a table with a header, and else from OpenML. Columns that
    most communities lack (the police survey) are left out, which leaves about 100 features; the few other gaps get the
    training part's median.
    """
    file = root / "communities.csv"
    if file.exists():
        table = pd.read_csv(file)
    else:
        table = fetch_openml(data_id=CRIME_OPENML_ID, data_home=root, as_frame=True).frame
    features = table.drop(columns=[*CRIME_NOT_PREDICTIVE, CRIME_TARGET], errors="ignore")
    # OpenML declares some numeric columns as nominal, where a gap may be the word "?".
    features = features.astype(object).mask(lambda cells: cells == "?").astype(float)
    features = features.loc[:, features.isna().mean() < 0.5]
    return regression_splits(features.to_numpy(), table[CRIME_TARGET].to_numpy(float), seed)


def diabetes(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """Diabetes (Efron et al., 2004): 442 patients, 10 features; scikit-learn ships it."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return regression_splits(x, y, seed)


def california(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """California Housing (Pace & Barry, 1997): 20,640 districts, 8 features."""
    x, y = fetch_california_housing(data_home=root, return_X_y=True)
    return regression_splits(x, y, seed)


def regression_splits(x: Array, y: Array, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """Split and scale features (N, D) and targets (N,); NaN features get the median of the training part.

    Returns:
        Train, validation and test sets of float32 pairs of shapes (D,) and (1,).
    """
    rows, test = train_test_split(np.arange(len(x)), test_size=0.2, random_state=seed)
    train, val = train_test_split(rows, test_size=0.1, random_state=seed)
    feature_scaler = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()).fit(x[train])
    target_scaler = MinMaxScaler().fit(y[train, None])

    def dataset(part: Array) -> InMemory:
        scaled = feature_scaler.transform(x[part]), target_scaler.transform(y[part, None])
        return InMemory(*(torch.from_numpy(values.astype(np.float32)) for values in scaled))

    return dataset(train), dataset(val), dataset(test)
