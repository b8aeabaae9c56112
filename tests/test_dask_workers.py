"""Convolutions of dask arrays in several threads, in other processes, and in little memory."""

from __future__ import annotations

import threading
import tracemalloc

import calls
import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster
from test_dask import BIAS, MODES, K, X, in_blocks, integers, same

from gpuconv import Conv2d, blocked, conv2d, conv_transpose2d


def test_memory_stays_at_a_few_blocks():
    """One after the other, of an image 64 blocks high no more are held at once than a few, scratch included."""
    rows, block = 64, 128 * 1024 * 4
    x = da.zeros((rows * 128, 1024), chunks=(128, 1024), dtype=np.float32) + 1  # blocks of one number take no memory
    y = conv2d(x, np.ones((5, 5), np.float32), padding="same", padding_mode="wrap", backend="numpy.gemm",
               workspace_limit=block)  # fmt: skip
    total = y.map_blocks(lambda part: part.sum(axis=1, keepdims=True), chunks=(128, 1), dtype=np.float32).sum()
    conv2d(np.ones((8, 8), np.float32), np.ones((5, 5), np.float32), backend="numpy.gemm")
    tracemalloc.start()
    value = total.compute(scheduler="synchronous")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value == 25 * rows * 128 * 1024
    assert peak < 12 * block, f"{peak / block:.1f} blocks"


def test_a_strip_does_not_hold_its_block():
    part = (slice(None), slice(None), slice(0, 3), slice(None))
    assert not np.shares_memory(blocked._strip(X, part), X)


# ---- threads and processes


def test_threads_at_once():
    y = conv2d(in_blocks(), K, BIAS, padding=1)
    same(y, conv2d(X, K, BIAS, padding=1), scheduler="threads", num_workers=8)


@pytest.fixture(scope="module")
def client():
    # Generous: a machine may be busy, or the test suspended for a while.
    patient = {
        "distributed.comm.timeouts.connect": "300s", "distributed.comm.timeouts.tcp": "600s",
        "distributed.scheduler.worker-ttl": None, "distributed.scheduler.allowed-failures": 10,
        "distributed.admin.tick.limit": "600s", "distributed.worker.memory.terminate": False,
        "distributed.deploy.lost-worker-timeout": "600s",
    }  # fmt: skip
    with (
        dask.config.set(patient),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", death_timeout=600
        ) as cluster,
        Client(cluster, timeout=300) as client,
    ):
        yield client


LIMIT = 300  # seconds for what takes one


@pytest.mark.parametrize("mode", MODES)
def test_other_processes_give_the_same(client, mode):
    layer = Conv2d(K, BIAS, stride=(2, 1), padding=((7, 1), (2, 40)), padding_mode=mode)
    many = [layer(in_blocks()), conv2d(in_blocks(), da.from_array(K, chunks=3), padding=30, padding_mode=mode)]
    values = [future.result(timeout=LIMIT) for future in client.compute(many)]
    assert np.array_equal(values[0], layer(X))
    assert np.array_equal(values[1], conv2d(X, K, padding=30, padding_mode=mode))


def test_workers_take_blocks_of_groups_and_transposed_ones(client):
    k = integers((4, 1, 3, 3))
    many = [conv2d(in_blocks(), k, groups=4, padding=1), conv_transpose2d(in_blocks(), K[:4], stride=2)]
    values = [future.result(timeout=LIMIT) for future in client.compute(many)]
    assert np.array_equal(values[0], conv2d(X, k, groups=4, padding=1))
    assert np.array_equal(values[1], conv_transpose2d(X, K[:4], stride=2))


def test_blocks_that_are_held_by_workers(client):
    held = client.persist(in_blocks())
    value = client.compute(conv2d(held, K, padding="same", padding_mode="reflect")).result(timeout=LIMIT)
    assert np.array_equal(value, conv2d(X, K, padding="same", padding_mode="reflect"))


def test_blocks_share_the_threads():
    """A block on a thread of a pool uses its share; what it was before is restored, and alone it has all."""
    from gpuconv.backends.numba_cpu import runtime

    if runtime.unavailable() is not None:
        pytest.skip("no compiled kernels on this machine")
    usual, seen = runtime.thread_count(), []

    def work() -> None:
        for blocks in (1, 1000):
            with blocked._threads(blocks):
                seen.append(runtime.thread_count())
        seen.append(runtime.thread_count())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [usual, 1, usual]
    with blocked._threads(1000):
        assert runtime.thread_count() == usual


@pytest.mark.parametrize("layer", ["workqueue", pytest.param("omp", marks=pytest.mark.full)])
def test_parallel_kernels_in_several_threads(layer):
    """As many threads as one asks for, in each of eight at once: Numba's workqueue would end the process."""
    calls.child(f"""
import numpy as np, dask.array as da, gpuconv, numba
x = np.random.default_rng(0).integers(-4, 5, (1, 8, 256, 256)).astype(np.float32)
k = np.random.default_rng(1).integers(-4, 5, (8, 8, 3, 3)).astype(np.float32)
wanted = gpuconv.conv2d(x, k, padding=1)
assert numba.threading_layer() == "{layer}"
for _ in range(3):
    y = gpuconv.conv2d(da.from_array(x, chunks=(1, 8, 64, 64)), k, padding=1)
    assert np.array_equal(y.compute(scheduler="threads", num_workers=8), wanted)
""", NUMBA_THREADING_LAYER=layer, GPUCONV_NUM_THREADS="2")  # fmt: skip
