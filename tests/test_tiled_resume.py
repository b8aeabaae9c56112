"""A run of conv2d_tiled that is killed or fails goes on where it stopped, or refuses: never a wrong answer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiled_child
from tiled_child import LIMIT, OPTIONS, SHAPE, Source, convolve, image, kernel, output

from gpuconv import Conv2d, conv2d, conv2d_tiled, schedule
from gpuconv.tiling import storage as storages
from gpuconv.tiling.record import Record

KINDS = ("npy", "zarr", "h5")


@pytest.fixture(scope="module")
def right() -> np.ndarray:
    return conv2d(image(), kernel(), **OPTIONS)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    needed = {"zarr": "zarr", "h5": "h5py"}.get(request.param)
    if needed:
        pytest.importorskip(needed, reason=f".{request.param} needs {needed}")
    return str(request.param)


def killed(folder: Path, kind: str, when: str) -> dict[str, Any]:
    """The record that a process leaves which is killed ``when``."""
    child = [sys.executable, tiled_child.__file__, str(folder), kind, when]
    path = os.pathsep.join([str(Path(tiled_child.__file__).parent), *sys.path])
    done = subprocess.run(child, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return read_record(folder, kind)


def record_path(folder: Path, kind: str) -> Path:
    return folder / f"y.{kind}.tiles.json"


def read_record(folder: Path, kind: str) -> dict[str, Any]:
    found = json.loads(record_path(folder, kind).read_text())
    assert isinstance(found, dict)
    return found


def values(out: Any) -> np.ndarray:
    return np.asarray(out[...])


def regions(record: dict[str, Any]) -> list[tuple[slice, slice]]:
    """Every tile of a record, in order."""
    found = list(schedule.blocks(SHAPE, record["of"]["tile"][2:]))
    return [(rows, columns) for rows, columns in found]


def finish(folder: Path, kind: str, right: np.ndarray, done: int, source: Any = None) -> None:
    """Go on; the result must be right, and the ``done`` first tiles there already and not computed again."""
    out, tiles = output(folder, kind), regions(read_record(folder, kind))
    assert 0 < done < len(tiles)
    for at in tiles[:done]:
        assert np.array_equal(out[at], right[at])
    with pytest.MonkeyPatch.context() as patch:
        computed, call = [], Conv2d.__call__
        patch.setattr(Conv2d, "__call__", lambda *given, **more: computed.append(0) or call(*given, **more))
        convolve(Source() if source is None else source, out)
    assert len(computed) == len(tiles) - done
    assert np.array_equal(values(out), right)
    assert not record_path(folder, kind).exists()
    if kind == "h5":
        out.file.close()


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gpuconv")]


# ---- killed


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
class TestKilled:
    def test_while_reading(self, kind, tmp_path, right):
        found = killed(tmp_path, kind, "read:30")
        finish(tmp_path, kind, right, found["done"])

    def test_between_the_data_and_the_record(self, tmp_path, right):
        found = killed(tmp_path, "npy", "record:3")
        assert found["done"] == 2  # the third is in the file, and made again
        finish(tmp_path, "npy", right, 2)

    def test_while_the_record_is_replaced(self, tmp_path, right):
        found = killed(tmp_path, "npy", "replace:3")
        assert found["done"] == 2
        assert record_path(tmp_path, "npy").with_name("y.npy.tiles.json.new").exists()
        finish(tmp_path, "npy", right, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["y.npy"]

    @pytest.mark.full
    def test_again_and_again(self, kind, tmp_path, right):
        found = [killed(tmp_path, kind, f"read:{read}")["done"] for read in (3, 30, 2, 1, 4)]
        assert found == sorted(found)
        finish(tmp_path, kind, right, found[-1])


# ---- failed


class Failing:
    """An output of which the write of row ``row`` raises ``error``."""

    def __init__(self, array: Any, row: int, error: BaseException) -> None:
        self.array, self.row, self.error = array, row, error
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, at: Any) -> Any:
        return self.array[at]

    def __setitem__(self, at: Any, values: Any) -> None:
        if at[0].start <= self.row < at[0].stop:
            raise self.error
        self.array[at] = values


def test_a_full_disk(tmp_path, right):
    record = tmp_path / "record.json"
    array = np.full(SHAPE, np.nan, np.float32)
    full = Failing(array, 70, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match="No space left on device") as caught:
        convolve(Source(), full, resume=record)
    assert caught.value.errno == errno.ENOSPC
    (note,) = caught.value.__notes__
    assert "while writing tile " in note
    assert "out[" in note
    assert str(record) in note
    assert not thread_names()
    found = json.loads(record.read_text())
    assert found["done"] >= 1
    for at in regions(found)[: found["done"]]:
        assert np.array_equal(array[at], right[at])
    full.row = -1
    convolve(Source(), full, resume=record)
    assert np.array_equal(array, right)


def test_a_disk_that_is_full_when_the_record_is_written(tmp_path, right, monkeypatch):
    save, calls = Record.save, iter(range(100))

    def full(self: Record) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self)

    monkeypatch.setattr(Record, "save", full)
    with pytest.raises(OSError, match="No space left"):
        convolve(Source(), output(tmp_path, "npy"))
    assert read_record(tmp_path, "npy")["done"] == 2
    finish(tmp_path, "npy", right, 2)


def test_a_sparse_file_is_given_its_blocks_first(tmp_path, monkeypatch):
    """Writing to a map when the disk is full would end the process, so that it is asked for all of it before."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = output(tmp_path, "npy")
    sparse = (tmp_path / "y.npy").stat().st_blocks * 512 < (tmp_path / "y.npy").stat().st_size
    monkeypatch.setattr(storages.os, "posix_fallocate", full)
    if not sparse:
        pytest.skip("this file system gives files their blocks at once")
    source = Source()
    with pytest.raises(OSError, match="No space left"):
        convolve(source, out)
    assert not source.reads
    monkeypatch.undo()
    convolve(source, out)
    assert (tmp_path / "y.npy").stat().st_blocks * 512 >= out.nbytes


@pytest.mark.full
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_small_file_system(kind, tmp_path, right):
    pytest.importorskip("zarr", reason=".zarr needs zarr")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system takes root")
    try:
        with pytest.raises(OSError, match="No space left"):
            convolve(Source(), output(folder, kind))
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        convolve(Source(), output(folder, kind))
        assert np.array_equal(values(output(folder, kind)), right)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_damaged_chunk(tmp_path, right):
    zarr = pytest.importorskip("zarr", reason="Zarr arrays need the extra `zarr`")
    source = zarr.create_array(tmp_path / "x.zarr", shape=SHAPE, chunks=(20, 32), dtype="float32")
    source[...] = image()
    chunk = tmp_path / "x.zarr" / "c" / "4" / "2"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    out = output(tmp_path, "zarr")
    with pytest.raises(Exception) as caught:  # each codec raises its own
        convolve(source, out)
    assert any("while reading tile" in note for note in caught.value.__notes__)
    chunk.write_bytes(whole)  # repaired: the same image, though its files have changed
    finish(tmp_path, "zarr", right, read_record(tmp_path, "zarr")["done"], source)


@pytest.mark.parametrize("where", ["read", "write"])
def test_an_error_of_any_kind_stops_all(where, tmp_path):
    class Broken(Source):
        def __getitem__(self, at: Any) -> Any:
            if where == "read" and at[0].stop > 60:
                raise KeyError("lost")
            return super().__getitem__(at)

    out: Any = np.zeros(SHAPE, np.float32)
    if where == "write":
        out = Failing(out, 60, KeyError("lost"))
    with pytest.raises(KeyError, match="lost") as caught:
        convolve(Broken(), out, resume=False)
    assert f"while {'reading' if where == 'read' else 'writing'} tile" in caught.value.__notes__[0]
    assert not thread_names()


def test_an_error_while_computing(monkeypatch, tmp_path):
    calls = iter(range(100))

    def broken(self: Any, x: Any, **options: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(Conv2d, "__call__", broken)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        convolve(Source(), output(tmp_path, "npy"))
    assert "while computing tile 3 of " in caught.value.__notes__[0]
    assert read_record(tmp_path, "npy")["done"] == 2  # what was computed before is written
    assert not thread_names()


@pytest.mark.skipif(os.name == "nt", reason="signals reach a waiting thread on POSIX only")
def test_an_interrupt_leaves_nothing_running(tmp_path, right):
    class Interrupting(Source):
        def __getitem__(self, at: Any) -> Any:
            if len(self.reads) == 30:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(at)

    # Where a shell runs the tests in the background, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            convolve(Interrupting(), output(tmp_path, "npy"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not thread_names()
    finish(tmp_path, "npy", right, read_record(tmp_path, "npy")["done"])


# ---- another call


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """A folder with an output of which two tiles are finished, and its record."""
    out = output(tmp_path, "npy")

    class Stopping(Source):
        def __getitem__(self, at: Any) -> Any:
            if at[0].stop > 70:
                raise InterruptedError("stop")
            return super().__getitem__(at)

    with pytest.raises(InterruptedError):
        convolve(Stopping(), out)
    assert read_record(tmp_path, "npy")["done"] >= 1
    return tmp_path


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"padding_mode": "edge"}, "the sizes, dtypes or options"),
        ({"flip": True}, "the sizes, dtypes or options"),
        ({"backend": "numpy.gemm"}, "the implementation that runs"),
        ({"workspace_limit": LIMIT // 3}, "the tiles"),
    ],
)
def test_a_record_of_another_call_is_refused(unfinished, options, what):
    before = record_path(unfinished, "npy").read_bytes(), (unfinished / "y.npy").read_bytes()
    with pytest.raises(ValueError, match=r"another one; what differs: .*or delete that file to begin anew") as caught:
        convolve(Source(), output(unfinished, "npy"), **options)
    assert what in str(caught.value)
    assert before == (record_path(unfinished, "npy").read_bytes(), (unfinished / "y.npy").read_bytes())


def test_other_weights_and_another_bias_are_refused(unfinished):
    out, options = output(unfinished, "npy"), OPTIONS | {"workspace_limit": LIMIT, "resume": True}
    with pytest.raises(ValueError, match="what differs: the weights of k"):
        conv2d_tiled(Source(), kernel() + 1, out, **options)
    with pytest.raises(ValueError, match="what differs: the bias, the sizes"):
        conv2d_tiled(Source(), kernel(), out, [1], **options)


def test_another_source_is_refused(unfinished):
    np.save(unfinished / "x.npy", image())
    with pytest.raises(ValueError, match="what differs: the source"):
        convolve(np.load(unfinished / "x.npy", mmap_mode="r"), output(unfinished, "npy"))


def test_a_source_that_has_changed_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", image())
    source, out = np.load(tmp_path / "x.npy", mmap_mode="r+"), output(tmp_path, "npy")
    calls = iter(range(100))

    def stopped(self: Record, values: Any) -> None:
        if next(calls) == 2:
            raise InterruptedError("stop")
        self.done += 1
        self.save()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Record, "add", stopped)
        convolve(source, out)
    source[0, 0] = 7
    source.flush()
    os.utime(tmp_path / "x.npy", ns=(0, 0))
    with pytest.raises(ValueError, match="what differs: the source's file, which has changed since"):
        convolve(source, out)


def test_an_output_made_anew_is_refused(unfinished, right):
    (unfinished / "y.npy").unlink()
    with pytest.raises(ValueError, match=r"records \d+ finished tiles, and out holds something else there"):
        convolve(Source(), output(unfinished, "npy"))
    record_path(unfinished, "npy").unlink()
    convolve(Source(), output(unfinished, "npy"))
    assert np.array_equal(values(output(unfinished, "npy")), right)


def test_a_larger_limit_goes_on_with_the_same_tiles(unfinished, right):
    out = output(unfinished, "npy")
    convolve(Source(), out, workspace_limit=16 * LIMIT)
    assert np.array_equal(values(out), right)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"format": "gpuconv tiles 1", "of": {}, "done": "3", "checksum": 0}', b"\xff"],
)
def test_a_file_that_is_no_record_is_left_alone(tmp_path, content):
    record_path(tmp_path, "npy").write_bytes(content)
    with pytest.raises(ValueError, match="no record of an unfinished run"):
        convolve(Source(), output(tmp_path, "npy"))
    assert record_path(tmp_path, "npy").read_bytes() == content


def test_places_for_a_record(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "record.json"):
        with pytest.raises(ValueError, match="path of a file in a folder that exists"):
            convolve(Source(), output(tmp_path, "npy"), resume=path)
    with pytest.raises(ValueError, match="which has none; pass a path"):
        convolve(Source(), Failing(np.zeros(SHAPE, np.float32), -1, KeyError()), resume=True)


def test_without_resume_nothing_is_left(tmp_path, right):
    source = Source()
    convolve(source, output(tmp_path, "npy"), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["y.npy"]
    assert np.array_equal(values(output(tmp_path, "npy")), right)


def test_data_reach_the_disk_before_the_record(tmp_path, monkeypatch):
    """And the new record before its name is changed, and the folder after that."""
    events: list[str] = []
    fsync, replace, flush = os.fsync, os.replace, storages.Mapped.flush

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
    monkeypatch.setattr(os, "replace", noted("replace", replace))
    monkeypatch.setattr(storages.Mapped, "flush", noted("data", flush))
    convolve(Source(), output(tmp_path, "npy"))
    assert events[:3] == ["fsync", "replace", "fsync"]  # the record of no tiles
    rest = events[3:]
    assert len(rest) > 8
    assert rest == ["data", "fsync", "replace", "fsync"] * (len(rest) // 4)
