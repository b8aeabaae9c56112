"""Tile shapes of ``numba_cuda.implicit_gemm_mma``: what a block of threads computes, and the memory it takes.

An instruction multiplies 16 outputs × 8 pixels. A warp has ``rows`` × ``columns`` of these in registers, a block
``warps_o`` × ``warps_p`` warps. Slices of products are on their way or in use in ``stages`` places of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuconv.backends.numba_cuda.tiles import REGISTERS, STATIC_SHARED_BYTES

# A row of a slice, of one output channel or one pixel: 32 products of 16 bits, or 16 of float32.
WORDS = 16
SLICE_BYTES = 4 * WORDS
STEP = 8  # words that one instruction takes
# 20 words from row to row: the 8 rows that ldmatrix reads at once begin at banks 0, 20, 8, 28, 16, 4, 24 and 12, four
# banks each, so that none is asked twice.
PITCH = WORDS + 4

# Pixels, and channels, that a block of ``channels_last`` turns round.
SIDE = 32

# The most that a block may ask for on any architecture from sm_80 on, which is that of sm_86 and sm_89.
MOST_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True)
class TensorTile:
    """Shape of a block's work; see ``faults`` for what it has to be."""

    rows: int
    columns: int
    warps_o: int
    warps_p: int
    stages: int
    # Blocks that one multiprocessor is to hold at least, which bounds the registers of a thread.
    blocks: int
    # Speed of a full tile against the best one's: a guess until a GPU has measured it.
    worth: float

    @property
    def warp_outputs(self) -> int:
        """Output channels of a warp."""
        return 16 * self.rows

    @property
    def warp_pixels(self) -> int:
        """Pixels of a warp."""
        return 8 * self.columns

    @property
    def outputs(self) -> int:
        """Output channels of the block."""
        return self.warps_o * self.warp_outputs

    @property
    def pixels(self) -> int:
        """Pixels of the block."""
        return self.warps_p * self.warp_pixels

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return 32 * self.warps_o * self.warps_p

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return 4 * self.rows * self.columns

    @property
    def registers(self) -> int:
        """Registers that a thread may use, so that ``blocks`` blocks fit; the hardware's most is 255."""
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)

    @property
    def stage(self) -> int:
        """Words of one slice: a row per output channel, then one per pixel."""
        return (self.outputs + self.pixels) * PITCH

    @property
    def parking_pitch(self) -> int:
        """Words from one output channel to the next of the sums on their way out.

        8 more than the pixels: the 8 rows that a warp writes at once begin at banks 0, 8, 16 and 24, two words each.
        """
        return self.pixels + 8

    @property
    def words(self) -> int:
        """Words of shared memory for the slices, or in the same place for the sums of one row of warps."""
        return max(self.stages * self.stage, self.warp_outputs * self.parking_pitch)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the above, and where each pixel is in x and y."""
        return 4 * self.words + (8 + 4 + 4 + 8) * self.pixels

    def shared(self, itemsize: int) -> int:
        """The same; a slice is as many bytes whatever its elements are."""
        return self.shared_bytes

    @property
    def dynamic_bytes(self) -> int:
        """What of it a launch has to ask for, because more than 48 KiB in all are not to be had without."""
        return 4 * self.words if self.shared_bytes > STATIC_SHARED_BYTES else 0

    def faults(self) -> list[str]:
        """What of the kernel's assumptions the shape breaks."""
        rows_at_once = self.threads // (SLICE_BYTES // 16)
        rules = {
            "ldmatrix reads two tiles of pixels at once": self.columns % 2 == 0,
            "every thread copies equally much": self.outputs % rows_at_once == self.pixels % rows_at_once == 0,
            "a thread for every pixel": self.threads >= self.pixels,
            "a slice is on its way while another is in use": self.stages >= 2,
            "sums and operands fit in registers": self.sums <= 128 and self.registers >= self.sums + 48,
            "shared memory suffices": self.blocks >= 1 and self.shared_bytes <= MOST_SHARED_BYTES,
        }
        return [rule for rule, holds in rules.items() if not holds]

    @property
    def name(self) -> str:
        """The shape in a word."""
        return f"{self.outputs}x{self.pixels}x{self.stages}"

    def __str__(self) -> str:
        return f"{self.outputs} outputs × {self.pixels} pixels, {self.stages} stages"


# 64 × 32 per warp read the least of shared memory for what they multiply at 64 sums per thread; 64 × 64 less still, at
# 128. Short sums want few stages, deep ones enough to hide the memory's latency behind two or three slices.
HUGE = TensorTile(4, 8, 2, 4, stages=3, blocks=1, worth=1.0)  # 128 × 256
LARGE = TensorTile(4, 4, 2, 4, stages=4, blocks=1, worth=0.95)  # 128 × 128
LARGE_3 = TensorTile(4, 4, 2, 4, stages=3, blocks=1, worth=0.92)
TALL = TensorTile(4, 4, 2, 2, stages=3, blocks=2, worth=0.85)  # 128 × 64
TALL_4 = TensorTile(4, 4, 2, 2, stages=4, blocks=2, worth=0.87)
WIDE = TensorTile(4, 4, 1, 4, stages=3, blocks=2, worth=0.85)  # 64 × 128
WIDE_4 = TensorTile(4, 4, 1, 4, stages=4, blocks=2, worth=0.87)
SQUARE = TensorTile(2, 4, 2, 2, stages=4, blocks=3, worth=0.65)  # 64 × 64
SQUARE_2 = TensorTile(2, 4, 2, 2, stages=2, blocks=3, worth=0.6)
SMALL = TensorTile(2, 4, 1, 1, stages=4, blocks=8, worth=0.35)  # 32 × 32, one warp

TILES = (HUGE, LARGE, LARGE_3, TALL, TALL_4, WIDE, WIDE_4, SQUARE, SQUARE_2, SMALL)
