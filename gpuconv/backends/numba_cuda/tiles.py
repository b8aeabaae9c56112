"""Tile shapes of ``numba_cuda.implicit_gemm``; ``cost`` picks one.

A tile is what one block of threads computes: ``outputs`` output channels of ``pixels`` output pixels, each thread
``rows`` × ``columns`` of them, ``depth`` products at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

# Threads of a warp, outputs × pixels. Of all shapes this one reads the fewest different vectors of shared memory in a
# step: 4 of weights and 8 of the window, each of them within one 128-byte row of banks.
WARP_O, WARP_P = 4, 8

# What a multiprocessor has, on every architecture from sm_75 on.
REGISTERS = 65536
STATIC_SHARED_BYTES = 48 * 1024  # that a launch may use without asking


@dataclass(frozen=True)
class Tile:
    """Shape of a block's work. All extents are powers of two; see ``faults`` for what else they have to be."""

    outputs: int
    pixels: int
    rows: int
    columns: int
    # Blocks that one multiprocessor is to hold at least, which bounds the registers of a thread.
    blocks: int
    # Speed of a full tile against the best one's: a guess until a GPU has measured it.
    worth: float
    # Products per slice. 8 of float32 are 32 bytes of one pixel's channels: a whole sector of memory.
    depth: int = 8

    @property
    def threads(self) -> int:
        """Threads of the block."""
        return (self.outputs // self.rows) * (self.pixels // self.columns)

    @property
    def registers(self) -> int:
        """Registers that a thread may use, so that ``blocks`` blocks fit; the hardware's most is 255."""
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)

    @property
    def stages(self) -> int:
        """Slices on their way or in use: one in registers or shared memory while another is multiplied."""
        return 2

    @property
    def name(self) -> str:
        """The shape in a word."""
        return f"{self.outputs}x{self.pixels}"

    def shared(self, itemsize: int) -> int:
        """Shared memory of a block, of elements of ``itemsize`` bytes."""
        return self.shared_bytes(16 // itemsize)

    def row_step(self, lanes: int) -> int:
        """From one of a thread's vectors of weights to its next: neighbouring threads have neighbouring vectors."""
        return self.outputs // self.rows * lanes

    def column_step(self, lanes: int) -> int:
        """The same of its vectors of the window."""
        return self.pixels // self.columns * lanes

    def pitch(self, lanes: int) -> int:
        """From one row of the window to the next: one vector more than the tile is wide.

        Threads that store different products of neighbouring pixels then hit different banks, and every row still
        begins at a multiple of 16 bytes.
        """
        return self.pixels + lanes

    def shared_bytes(self, lanes: int) -> int:
        """Shared memory of a block: both halves of weights and window, and where each pixel is in x and y."""
        itemsize = 16 // lanes
        return 2 * self.depth * (self.outputs + self.pitch(lanes)) * itemsize + (8 + 4 + 4 + 8) * self.pixels

    def faults(self, lanes: int) -> list[str]:
        """What of the kernel's assumptions the shape breaks, for vectors of ``lanes`` elements."""
        threads_o, threads_p = self.outputs // self.rows, self.pixels // self.columns
        near = self.threads // self.pixels
        rules = {
            "threads form whole warps": threads_o % WARP_O == 0 and threads_p % WARP_P == 0,
            "a thread has whole vectors": self.rows % lanes == self.columns % lanes == 0,
            "every thread loads equally much of the window": near >= 1 and self.threads % self.pixels == 0,
            "and whole vectors of channels": near >= 1 and self.depth % (lanes * near) == 0,
            "every thread loads equally much of the weights": self.outputs * self.depth % (self.threads * lanes) == 0,
            "shared memory needs no asking": self.shared_bytes(lanes) <= STATIC_SHARED_BYTES,
        }
        return [rule for rule, holds in rules.items() if not holds]

    def __str__(self) -> str:
        return f"{self.outputs} outputs × {self.pixels} pixels × {self.depth} deep"


# A thread's 64 sums, 16 factors and 8 prefetched values leave 40 of 128 registers for addresses; with fewer threads a
# block prefetches more, and needs more.
WIDE = Tile(128, 128, rows=8, columns=8, blocks=2, worth=1.0)
FEW_OUTPUTS = Tile(64, 128, rows=8, columns=8, blocks=3, worth=0.9)
SQUARE = Tile(64, 64, rows=8, columns=8, blocks=7, worth=0.75)
NARROW = Tile(32, 64, rows=4, columns=8, blocks=8, worth=0.6)
SMALL = Tile(16, 32, rows=4, columns=4, blocks=16, worth=0.3)  # one warp

# A double takes two registers: half as many sums.
SQUARE_64 = Tile(64, 64, rows=4, columns=8, blocks=3, worth=1.0)
NARROW_64 = Tile(32, 64, rows=4, columns=4, blocks=4, worth=0.7)
SMALL_64 = Tile(16, 32, rows=4, columns=4, blocks=12, worth=0.4)  # what sm_86 has shared memory for

TILES = {"float32": (WIDE, FEW_OUTPUTS, SQUARE, NARROW, SMALL), "float64": (SQUARE_64, NARROW_64, SMALL_64)}
