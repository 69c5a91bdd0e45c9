"""The notebook runs from top to bottom, draws what it promises, and is kept without outputs."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(PATH, as_version=4).cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the client and the kernel are not ours
def test_it_runs_from_top_to_bottom_and_draws_inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert not "".join(output.text for output in outputs if output.get("name") == "stderr")
    own, learned = (float(re.findall(rf"{name}: ([\d.]+)", printed)[0]) for name in ("own loss", "the library"))
    assert learned < 0.5 * own
    assert int(re.findall(r"worst twenty: (\d+)", printed)[0]) >= 18
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    for number, picture in enumerate(pictures):
        data = base64.b64decode(picture)
        (tmp_path / f"{number}.png").write_bytes(data)
        pixels = matplotlib.image.imread(BytesIO(data))
        assert min(pixels.shape[:2]) > 150
        assert pixels.std() > 0.05
