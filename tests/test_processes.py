"""Threads, forks and processes: cold caches under a barrier, fork after use, Numba's threading layers, the same bits.

What needs a clean process runs in a child of its own; ``calls`` holds the operators that it runs.
"""

from __future__ import annotations

import json
import os
import sys

import calls
import fake_cupy
import pytest

SIMULATOR = {"NUMBA_ENABLE_CUDASIM": "1"}
STAND_IN = {"GPUCONV_TEST_FAKE_CUPY": "1"}

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_compiler = pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")
pytestmark = pytest.mark.skipif(
    any(os.environ.get(name) == "1" for name in (*SIMULATOR, *STAND_IN)), reason="this process is a child itself"
)


# ---- importing


@linux
def test_importing_starts_nothing():
    """No thread, no open file, no CUDA library and so no context, no handler of a signal, no module of a GPU."""
    calls.child("""
import os, signal, sys, threading
import numpy  # which starts the threads of its BLAS
def state():
    with open("/proc/self/maps") as maps:
        cuda = [line for line in maps if "cuda" in line.lower() or "nvidia" in line.lower()]
    return (len(os.listdir("/proc/self/task")), threading.active_count(), len(os.listdir("/proc/self/fd")), cuda,
            [signal.getsignal(number) for number in signal.valid_signals()])
before = state()
import gpuconv
assert state() == before, (before, state())
assert not before[3], before[3]
assert not {"numba", "numba_cuda", "llvmlite", "cupy", "cupy_backends", "torch"} & sys.modules.keys()
""")


# ---- threads on cold caches


def share_served(jobs: str, threads: int, each: int, prelude: str = "", **environment: str) -> float:
    """The share of ``jobs`` that were not refused, run behind a barrier in a new process."""
    script = f"{prelude}\nimport calls\nprint(calls.on_threads({threads}, {jobs}, {each}))"
    return int(calls.child(script, **environment)) / (threads * each)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))])
def test_32_threads_on_cold_caches(attempt):
    """Every implementation that is usable here, mixed dtypes, shapes and operators; each attempt is a new process."""
    assert share_served("calls.jobs(calls.usable())[::5]", threads=32, each=20) > 0.9


ONE_COMPILER = """
import threading
import fake_cupy
lock, plain = threading.Lock(), fake_cupy._compiled
def compiled(source):
    with lock:  # else up to 32 compilers of one source at once
        return plain(source)
fake_cupy._compiled = compiled
"""


@needs_compiler
def test_32_threads_on_cold_caches_on_the_stand_in():
    jobs = 'calls.jobs(["cupy.gemm"], ("float32", "float16", "complex64", "int8"))'
    assert share_served(jobs, threads=32, each=8, prelude=ONE_COMPILER, **STAND_IN) == 1


SAFE_SIMULATOR = """
import threading
from numba.cuda.simulator import kernel
launching, getitem = threading.Lock(), kernel.FakeCUDAKernel.__getitem__
def launch(self, configuration):
    def run(*arguments):
        with launching:
            getitem(self, configuration)(*arguments)
    return run
kernel.FakeCUDAKernel.__getitem__ = launch
"""


def test_threads_on_cold_caches_in_the_simulator():
    """Numba's simulator refuses two kernels at once: it keeps the one that runs in a global, and the grid in the kernel
    object. So a lock goes around each launch; what gpuconv does before and after still runs side by side.
    """
    jobs = 'calls.jobs(["numba_cuda.direct"], ("float32", "bfloat16", "int8"), calls.GEOMETRIES[2:])'
    assert share_served(jobs, threads=6, each=2, prelude=SAFE_SIMULATOR, **SIMULATOR) == 1


def test_clear_explain_and_info_beside_threads():
    calls.child("""
import threading
import calls, gpuconv
todo, stop, rounds = calls.jobs(calls.usable("cpu"))[::5], threading.Event(), []
def meddle():
    while not stop.is_set():
        gpuconv.clear()
        gpuconv.info()
        assert gpuconv.explain((2, 3, 9, 9), (4, 3, 3, 3)).implementation
        rounds.append(1)
beside = threading.Thread(target=meddle)
beside.start()
try:
    calls.on_threads(8, todo, 40)
finally:
    stop.set()
    beside.join()
assert rounds
""")


# ---- forks

FORK = """
import os, threading
import calls, gpuconv
todo = calls.jobs(calls.usable("cpu"))[::5]  # a step that meets every operator, dtype and implementation
wanted = str(calls.on_threads(4, todo, len(todo)) // 4)
gpuconv.info(), gpuconv.explain((2, 3, 9, 9), (4, 3, 3, 3), device="cuda")
"""


@forks
@pytest.mark.parametrize("layer", [None, "omp"])
def test_a_forked_child_computes(layer):
    """After every CPU implementation ran on threads; also with GNU's OpenMP as Numba's threading layer, which ends a
    child that enters it.
    """
    calls.child(
        FORK
        + """
def all_of_it():
    served = calls.run_all(todo)
    assert calls.on_threads(4, todo, len(todo)) == 4 * served
    assert calls.forked(lambda: calls.run_all(todo)) == str(served), "a fork of the fork"
    assert gpuconv.info().versions
    return served
for _ in range(2):
    answer = calls.forked(all_of_it)
    assert answer == wanted, answer
assert str(calls.run_all(todo)) == wanted, "the parent after the forks"
""",
        **({} if layer is None else {"NUMBA_THREADING_LAYER": layer}),
    )


@forks
def test_forks_while_other_threads_convolve():
    """No lock of ours stays held in the child. One thread of BLAS: with two, OpenBLAS itself hangs in a child that is
    forked while another thread multiplies.
    """
    calls.child(
        FORK
        + """
stop = threading.Event()
def work():
    while not stop.is_set():
        calls.run_all(todo)
beside = [threading.Thread(target=work) for _ in range(4)]
for thread in beside:
    thread.start()
try:
    for _ in range(8):
        answer = calls.forked(lambda: calls.run_all(todo), limit=30)
        assert answer.isdigit(), answer
finally:
    stop.set()
""",
        OPENBLAS_NUM_THREADS="1",
    )


@forks
def test_a_fork_before_the_first_call():
    calls.child("""
import calls
answer = calls.forked(lambda: calls.run_all(calls.jobs(calls.usable("cpu"))[::5]))
assert answer.isdigit() and int(answer) >= 20, answer
""")


POOL = """
import functools, multiprocessing
import calls
@functools.cache
def todo():
    return calls.jobs(calls.usable("cpu"), ("float32", "bfloat16", "complex64", "int8"))
def share(number):
    return calls.run_all(todo()[number::8])
if __name__ == "__main__":
    wanted = [share(number) for number in range(4)]
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(share, range(4), chunksize=1) == wanted
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_processes(method, tmp_path):
    if method != "spawn" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    main = tmp_path / "main.py"  # a file, because a spawned process imports its parent's main program
    main.write_text(POOL.format(method=method))
    calls.child(f"import runpy; runpy.run_path({str(main)!r}, run_name='__main__')")


CUDA_FORK = """
import warnings
import numpy as np
import calls, gpuconv
x, k = np.ones((2, 3, 9, 9), np.float32), np.ones((4, 3, 3, 3), np.float32)
assert gpuconv.conv2d(x, k, device="cuda")[0, 0, 0, 0] == 27
def child():
    found = []
    for request in ({}, {"device": "cpu"}, {"device": "cuda"}, {"backend": "cupy"}, {"backend": "numba_cuda"}):
        try:
            found.append(str(gpuconv.conv2d(x, k, **request)[0, 0, 0, 0]))
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}".replace(chr(10), " "))
    return chr(10).join(found)
print(calls.forked(child))
"""


def check_cuda_fork(lines: list[str]) -> None:
    assert lines[:2] == ["27.0"] * 2, "NumPy arrays on the CPU have nothing to do with CUDA"
    for line in lines[2:]:
        assert "conv2d: " in line and "fork" in line, f"no clear message in {line!r}"


@pytest.mark.gpu
@forks
def test_a_forked_child_is_told_that_cuda_cannot_be_used():
    """CUDA cannot be used in a child forked after its first use: a message that says so, soon, and no hang."""
    check_cuda_fork(calls.child(CUDA_FORK).splitlines())


BROKEN_BY_FORKS = """
import fake_cupy, os, sys
def refuse(*arguments, **options):
    raise RuntimeError("cudaErrorInitializationError: initialization error")
def break_all():
    cupy = sys.modules["cupy"]
    cupy.cuda.runtime.getDeviceCount = cupy.cuda.Device = cupy.asarray = cupy.empty = cupy.zeros = refuse
os.register_at_fork(after_in_child=break_all)
"""


@forks
@needs_compiler
def test_a_forked_child_is_told_that_cuda_cannot_be_used_on_the_stand_in():
    """To a forked child the CUDA runtime answers cudaErrorInitializationError, whatever is asked."""
    lines = calls.child(BROKEN_BY_FORKS + CUDA_FORK, **STAND_IN).splitlines()
    check_cuda_fork(lines[:-1])  # Numba has no stand-in


# ---- Numba's threading layers

LAYER = """
import sys, threading
import numba, numpy as np
import calls
@numba.njit(parallel=True)
def total(values):
    found = 0.0
    for index in numba.prange(values.size):
        found += values[index]
    return found
ones = np.ones(20_000)
try:
    total(ones)
except ValueError as error:
    print("missing:", " ".join(str(error).split()))
    sys.exit(0)
stop, rounds = threading.Event(), []
def user():
    while not stop.is_set():
        rounds.append(total(ones) == 20_000)
beside = threading.Thread(target=user)
beside.start()
todo = calls.jobs(calls.usable("cpu"))[::5]
try:
    served = calls.on_threads(8, todo, len(todo)) // 8
finally:
    stop.set()
    beside.join()
assert rounds and all(rounds), rounds
assert served == calls.run_all(todo)
print(numba.threading_layer())
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threading_layers_of_numba(layer):
    """Eight threads run every CPU implementation while a ninth runs a user's own parallel function.

    workqueue ends the process when two threads are in parallel code. The user keeps Numba's rule, one thread; what
    gpuconv does inside its calls the user cannot know.
    """
    # where pip puts the library of the tbb package
    libraries = os.pathsep.join([os.path.join(sys.prefix, "lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    answer = calls.child(LAYER, NUMBA_THREADING_LAYER=layer, LD_LIBRARY_PATH=libraries).strip()
    if answer.startswith("missing:"):
        pytest.skip(f"threading layer {layer}: {answer.removeprefix('missing: ')}")
    assert answer == layer


# ---- the same bits

BITS = """
import hashlib, json
import calls
large = (calls.Geometry(N=2, groups=2, I=24, outputs=16, H=20, W=18, KW=3, padding=(1, 1)),
         calls.Geometry(N=1, groups=1, I=150, outputs=40, H=9, W=10, stride=(2, 1)))
names, found = calls.usable({device!r}), {{}}
for g in large:
    for dtype in ("float32", "float16", "complex64"):
        for call in calls.make(g, dtype, exact=False):
            for name in calls.serving(call, names):
                y = calls.host(call.run(backend=name))
                found[name + " " + call.name] = hashlib.sha256(y.tobytes()).hexdigest()
calls.on_threads(4, calls.jobs(names)[::5], 30)  # and right with this number of threads
print(json.dumps(found))
"""
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "GPUCONV_NUM_THREADS", "NUMBA_NUM_THREADS")


def bits(device: str, threads: int, **environment: str) -> dict[str, str]:
    found = json.loads(calls.child(BITS.format(device=device), **dict.fromkeys(THREADS, str(threads)), **environment))
    assert found
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_same_bits_in_two_processes(device):
    """One process as the other, for every implementation; our own kernels also with another number of threads, where
    a GEMM library may cut its sums elsewhere.
    """
    first, again, more = bits(device, 1), bits(device, 1, PYTHONHASHSEED="7"), bits(device, 2)
    assert again == first
    assert more.keys() == first.keys()
    own = [name for name in first if name.startswith("numba")]
    assert {name: more[name] for name in own} == {name: first[name] for name in own}
