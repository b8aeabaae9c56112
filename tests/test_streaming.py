"""Large NumPy arrays on a GPU: the order of copies and launches, and the answers that come of it.

The order is tried on lanes that land their work as late, or as early, as they may: what is read before its wait is NaN,
or is what was there before. The rest runs on the stand-in for CuPy, in a process of its own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv import cutting, streaming
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem
from gpuconv.streaming import COMPUTE, DOWNLOAD, UPLOAD, Slot, Steps

TESTS = Path(__file__).parent
in_child = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"
on_the_stand_in = pytest.mark.skipif(not in_child, reason="runs in the process that has a stand-in for CuPy")


# ---- the order alone


@dataclass
class Task:
    land: Callable[[], None]
    spoils: np.ndarray | None = None  # what is being written from its start until it lands
    after: tuple[str, int] | None = None  # a lane and how much of it must be done


class Lanes:
    """Three lanes that begin and land their work by a policy: each "eager", "lazy", or "slow", which begins at once
    and lands at the last moment. ``without`` names a wait that is left out.
    """

    def __init__(self, policy: dict[str, str], without: str = "") -> None:
        self.policy, self.without = policy, without
        self.asked: dict[str, list[Task]] = {lane: [] for lane in (UPLOAD, COMPUTE, DOWNLOAD)}
        self.begun, self.landed = dict.fromkeys(self.asked, 0), dict.fromkeys(self.asked, 0)

    def ask(self, lane: str, task: Task) -> None:
        self.asked[lane].append(task)
        while any(self._goes_on(name) for name in self.asked):
            pass

    def copy(self, lane: str, to: np.ndarray, source: np.ndarray, size: int) -> None:
        def land() -> None:
            to[:size] = source[:size]

        self.ask(lane, Task(land, to[:size]))

    def upload(self, slot: Slot, size: int) -> None:
        self.copy(UPLOAD, slot.x, slot.sent, size)

    def download(self, slot: Slot, size: int) -> None:
        self.copy(DOWNLOAD, slot.received, slot.y, size)

    def record(self, lane: str) -> tuple[str, int]:
        return lane, len(self.asked[lane])

    def wait(self, lane: str, mark: tuple[str, int]) -> None:
        if lane != self.without:
            self.ask(lane, Task(lambda: None, None, mark))

    def reach(self, mark: tuple[str, int]) -> None:
        if self.without != "host":
            self._force(*mark)

    def settle(self) -> None:
        for lane, asked in self.asked.items():
            self._force(lane, len(asked))

    def _begin(self, lane: str) -> None:
        task = self.asked[lane][self.begun[lane]]
        self.begun[lane] += 1
        if task.spoils is not None:
            task.spoils[...] = np.nan

    def _land(self, lane: str) -> None:
        self.asked[lane][self.landed[lane]].land()
        self.landed[lane] += 1

    def _goes_on(self, lane: str) -> bool:
        """One step of what the lane's policy does unasked."""
        if self.policy[lane] == "lazy" or self.begun[lane] == len(self.asked[lane]):
            return False
        if self.begun[lane] > self.landed[lane]:
            return False  # a slow one, which has begun what it will land when it must
        task = self.asked[lane][self.begun[lane]]
        if task.after is not None and self.landed[task.after[0]] < task.after[1]:
            return False
        self._begin(lane)
        if self.policy[lane] == "eager" or task.spoils is None:
            self._land(lane)
        return True

    def _force(self, lane: str, count: int) -> None:
        while self.landed[lane] < count:
            task = self.asked[lane][self.landed[lane]]
            if task.after is not None:
                self._force(*task.after)
            if self.begun[lane] == self.landed[lane]:
                self._begin(lane)
            self._land(lane)


@dataclass(frozen=True)
class Numbers:
    """A piece: the numbers from ``start``."""

    start: int
    x_bytes: int
    y_bytes: int


def pipe(lanes: Lanes, sizes: list[int], slots: list[Slot], fail_at: int | None = None) -> np.ndarray:
    """Send numbers through the lanes, in pieces of ``sizes``; what comes back, which is to be 2·x + 1."""
    source = np.arange(1.0, sum(sizes) + 1)
    result = np.full(source.shape, -1.0)
    starts = itertools.accumulate(sizes, initial=0)
    pieces = [Numbers(start, size, size) for start, size in zip(starts, sizes, strict=False)]

    def fill(piece: Numbers, slot: Slot) -> None:
        slot.sent[: piece.x_bytes] = source[piece.start : piece.start + piece.x_bytes]

    def launch(piece: Numbers, slot: Slot) -> None:
        if piece.start == fail_at:
            raise MemoryError("no scratch")
        size = piece.x_bytes

        def land() -> None:
            slot.y[:size] = 2 * slot.x[:size] + 1

        lanes.ask(COMPUTE, Task(land, slot.y[:size]))

    def drain(piece: Numbers, slot: Slot) -> None:
        result[piece.start : piece.start + piece.y_bytes] = slot.received[: piece.y_bytes]

    # Earlier work that still uses the memory which the slots were given.
    for slot in slots:
        lanes.ask(COMPUTE, Task(lambda slot=slot: slot.x.fill(-7), slot.x))
    streaming.run(pieces, slots, lanes, Steps(fill, launch, drain))
    return result


def make_slots(count: int, size: int) -> list[Slot]:
    return [Slot(*(np.full(size, np.nan) for _ in range(4))) for _ in range(count)]


POLICIES = [
    dict(zip((UPLOAD, COMPUTE, DOWNLOAD), kinds, strict=True))
    for kinds in itertools.product(("eager", "lazy", "slow"), repeat=3)
]


def right(result: np.ndarray) -> bool:
    return np.array_equal(result, 2 * np.arange(1.0, len(result) + 1) + 1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(policy.values()))
def test_every_piece_comes_back(policy):
    for count, pieces in itertools.product((1, 2, 4), (1, 2, 3, 9)):
        sizes = [3] * (pieces - 1) + [2]
        lanes = Lanes(policy)
        assert right(pipe(lanes, sizes, make_slots(count, 3))), (count, pieces)
        assert lanes.landed == {lane: len(asked) for lane, asked in lanes.asked.items()}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from(POLICIES))
def test_pieces_of_any_size(sizes, count, policy):
    assert right(pipe(Lanes(policy), sizes, make_slots(count, 5)))


@pytest.mark.parametrize("missing", [UPLOAD, COMPUTE, DOWNLOAD, "host"])
def test_no_wait_can_be_left_out(missing):
    """Each of the four waits is needed: without it some timing of the lanes gives a wrong answer."""
    found = [right(pipe(Lanes(policy, missing), [3] * 9, make_slots(4, 3))) for policy in POLICIES]
    assert not all(found)


def test_a_slot_that_is_used_too_early_shows():
    a, b = make_slots(2, 3)
    found = [right(pipe(Lanes(policy), [3] * 9, [a, b, a, b])) for policy in POLICIES]
    assert not all(found)
    shared = replace(b, sent=a.sent)
    assert not all(right(pipe(Lanes(policy), [3] * 9, [a, shared])) for policy in POLICIES)
    shared = replace(b, received=a.received)
    assert not all(right(pipe(Lanes(policy), [3] * 9, [a, shared])) for policy in POLICIES)


@pytest.mark.parametrize("policy", POLICIES[::5], ids=lambda policy: "-".join(policy.values()))
def test_after_an_error_nothing_is_under_way(policy):
    lanes = Lanes(policy)
    with pytest.raises(MemoryError, match="no scratch"):
        pipe(lanes, [3] * 9, make_slots(4, 3), fail_at=15)
    assert lanes.landed == {lane: len(asked) for lane, asked in lanes.asked.items()}


# ---- pieces that are added up


def added_up(lanes: Lanes, sizes: list[int], count: int, fail_at: int | None = None) -> float:
    """Numbers through the lanes in pieces of ``sizes``, one after the other: t becomes 3·t + the sum of a piece."""
    source = np.arange(1.0, sum(sizes) + 1)
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    pieces = [Numbers(start, size, int(start == starts[-1])) for start, size in zip(starts, sizes, strict=True)]
    slots = make_slots(count, max(sizes))
    slots = [replace(slot, y=slots[0].y, received=slots[0].received) for slot in slots]
    found: list[float] = []

    def fill(piece: Numbers, slot: Slot) -> None:
        slot.sent[: piece.x_bytes] = source[piece.start : piece.start + piece.x_bytes]

    def launch(piece: Numbers, slot: Slot) -> None:
        if piece.start == fail_at:
            raise MemoryError("no scratch")

        def land() -> None:
            slot.y[0] = (3 * slot.y[0] if piece.start else 0) + slot.x[: piece.x_bytes].sum()

        lanes.ask(COMPUTE, Task(land))

    def drain(piece: Numbers, slot: Slot) -> None:
        if piece.y_bytes:
            found.append(float(slot.received[0]))

    for slot in slots:
        lanes.ask(COMPUTE, Task(lambda slot=slot: slot.x.fill(-7), slot.x))
    streaming.run(pieces, slots, lanes, Steps(fill, launch, drain))
    (total,) = found
    return total


def is_total(total: float, sizes: list[int]) -> bool:
    wanted, start = 0.0, 1
    for size in sizes:
        wanted = 3 * wanted + sum(range(start, start + size))
        start += size
    return total == wanted


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(policy.values()))
def test_pieces_are_added_up_in_their_order(policy):
    for count, pieces in itertools.product((1, 2, 4), (1, 2, 3, 9)):
        sizes = [3] * (pieces - 1) + [2]
        lanes = Lanes(policy)
        assert is_total(added_up(lanes, sizes, count), sizes), (count, pieces)
        assert lanes.landed == {lane: len(asked) for lane, asked in lanes.asked.items()}
        downloads = sum(task.spoils is not None for task in lanes.asked[DOWNLOAD])
        assert downloads == 1, "what is added up comes down once"


@pytest.mark.parametrize("missing", [UPLOAD, COMPUTE, DOWNLOAD, "host"])
def test_no_wait_can_be_left_out_of_a_sum(missing):
    found = [is_total(added_up(Lanes(policy, missing), [3] * 9, 4), [3] * 9) for policy in POLICIES]
    assert not all(found)


@pytest.mark.parametrize("policy", POLICIES[::5], ids=lambda policy: "-".join(policy.values()))
def test_after_an_error_in_a_sum_nothing_is_under_way(policy):
    lanes = Lanes(policy)
    with pytest.raises(MemoryError, match="no scratch"):
        added_up(lanes, [3] * 9, 4, fail_at=15)
    assert lanes.landed == {lane: len(asked) for lane, asked in lanes.asked.items()}


# ---- how problems are cut

GPU = Target("cuda", 0)
MiB = 1 << 20


def cut(line: str, name: str = "cupy.gemm", limit: int = 256 * MiB) -> list[cutting.Piece] | None:
    return cutting.cut(name, Conv2dProblem.parse(line), GPU, limit)


def test_small_problems_are_moved_whole():
    assert cut("n8c3h64w64_o16kh3kw3") is None
    assert cut("n64c8h16w16_o8kh3kw3") is None
    assert cut("n0c64h512w512_o64kh3kw3") is None
    assert cut("n8c64h14w14_o64kh3kw3_wgrad") is None
    assert cut("n0c64h512w512_o64kh3kw3_wgrad") is None


def test_batches_are_cut_into_images():
    pieces = cut("n100c64h56w56_o64kh3kw3_p1")
    assert pieces is not None
    assert [piece.rows for piece in pieces] == [None] * len(pieces)
    sizes = [piece.images.stop - piece.images.start for piece in pieces]
    assert sum(sizes) == 100
    assert max(sizes) - sizes[-1] <= len(sizes), "even shares"
    assert max(piece.x_bytes for piece in pieces) <= 16 * MiB
    smaller = cut("n100c64h56w56_o64kh3kw3_p1", limit=64 * MiB)
    assert smaller is not None
    assert max(piece.x_bytes for piece in smaller) <= 4 * MiB


def test_large_images_are_cut_into_rows(monkeypatch):
    pieces = cut("n1c3h8192w8192_o8kh5kw5_p2")
    assert pieces is not None
    assert [piece.rows.start for piece in pieces[1:]] == [piece.rows.stop for piece in pieces[:-1]]
    assert (pieces[0].rows.start, pieces[-1].rows.stop) == (0, 8192)
    assert max(max(piece.x_bytes, piece.y_bytes) for piece in pieces) <= 16 * MiB
    assert len({piece.plan.problem for piece in pieces}) <= 2, "all padded alike"
    monkeypatch.setattr(cutting, "_BY_ROWS", ("numba_cuda.direct",))
    assert cut("n1c3h8192w8192_o8kh5kw5_p2") is None, "its sums may depend on the rows"


def test_windows_that_overlap_too_much_are_not_cut_too_thin():
    pieces = cut("n1c16h2048w2048_o16kh65kw3_p32")
    assert pieces is None or all(piece.rows is None or piece.plan.problem.H < 1.3 * 2048 for piece in pieces)
    for piece in pieces or ():
        assert piece.rows is None or piece is pieces[-1] or piece.plan.problem.H <= 1.3 * piece.plan.problem.OH


@pytest.mark.parametrize("limit", [2**20, 2**24, 2**28])
@pytest.mark.parametrize(
    "line", ["n64c64h112w112_o128kh3kw3_s2p1", "n1c512h1024w1024_o512kh3kw3_p1", "n3c1h9000w9000_o1kh9kw9"]
)
def test_few_bytes_are_on_the_gpu(line, limit):
    pieces = cut(line, "numba_cuda.direct", limit)
    assert pieces is not None
    assert 2 * max(piece.x_bytes + piece.y_bytes for piece in pieces) <= 256 * MiB
    problem = Conv2dProblem.parse(line)
    made = 0
    for piece in pieces:
        rows = problem.OH if piece.rows is None else piece.rows.stop - piece.rows.start
        made += (piece.images.stop - piece.images.start) * rows
    assert made == problem.N * problem.OH
    assert all(piece.plan.workspace <= limit for piece in pieces)


@pytest.mark.parametrize("name", ["cupy.gemm", "numba_cuda.direct", "numba_cuda.implicit_gemm"])
@pytest.mark.parametrize(
    "line", ["n100c64h56w56_o64kh3kw3_p1_wgrad", "n2c8h4096w1024_o8kh5kw5_s2d2p2_wgrad", "n500c3h64w64_o8kh3kw3_wgrad"]
)
def test_how_sums_are_split_depends_on_the_problem_alone(name, line):
    """On no limit; every pixel of y is in one piece, and no piece is large."""
    problem = Conv2dProblem.parse(line)
    found = [cut(line, name, limit) for limit in (2**25, 2**28, 2**30)]
    shares = [[(piece.images, piece.rows) for piece in pieces or ()] for pieces in found]
    assert shares[0] == shares[1] == shares[2] and len(shares[0]) > 1
    for pieces, limit in zip(found, (2**25, 2**28, 2**30), strict=True):
        assert pieces is not None
        covered = np.zeros((problem.N, problem.OH), int)
        for piece in pieces:
            covered[piece.images, piece.rows or slice(None)] += 1
        assert (covered == 1).all()
        assert max(piece.x_bytes for piece in pieces) <= 16 * MiB
        assert [piece.y_bytes > 0 for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        beside = cutting.made(pieces[0].plan.problem).stop + cutting.total(pieces[0].plan.problem).stop
        assert all(piece.plan.workspace + beside <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("code", "summand", "total"),
    [("f16", "float32", "float64"), ("bf16", "float32", "float64"), ("f32", "float32", "float64"),
     ("f64", "float64", "float64"), ("c64", "complex64", "complex128"), ("i16", "int64", "int64")],
)  # fmt: skip
def test_what_the_pieces_of_a_weight_gradient_are_added_up_in(code, summand, total):
    pieces = cut(f"n100c64h56w56_o64kh3kw3_wgrad_{code}")
    assert pieces is not None
    problem = pieces[0].plan.problem
    assert (problem.y_dtype, cutting.total(problem).dtype) == (summand, total)


def test_sizes_beyond_all_memory_take_no_time():
    """``explain`` takes shapes that no array has."""
    for op in ("", "_wgrad"):
        assert cut(f"n4096c64h65536w65536_o64kh3kw3_p1{op}") is None


def test_a_kernel_larger_than_its_images_is_not_cut():
    """Its sum and one summand would not leave room for the scratch of a piece."""
    assert cut("n40c2048h9w9_o2048kh3kw3_p1_wgrad", limit=64 * MiB) is None
