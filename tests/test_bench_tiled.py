"""The measurement of images larger than memory, on one that is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zarr", reason="the measurement writes Zarr arrays")
ROOT = Path(__file__).parent.parent


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from Linux's /proc")
def test_a_small_image(tmp_path):
    path = tmp_path / "rows.json"
    command = ["tiled", "--size", "1100", "--folder", str(tmp_path), "--workspace-limit", "64", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "bench", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kind"], row["resume"]) for row in rows] == [
        (kind, again) for kind in ("npy", "zarr") for again in (0, 1)
    ]
    for row in rows:
        assert row["largest_error"] < 1e-4
        assert row["bytes_before_the_call"] <= row["peak_bytes"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
