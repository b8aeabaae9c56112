"""Shape of the tiles of ``numba_cuda.implicit_gemm_mma``: one for all, that fits what every launch may use.

A warp's 4 × 4 instruction tiles of 16 outputs × 8 pixels are 64 sums per thread, with 24 words of operands. Two warps
by two make 128 threads for 128 outputs × 64 pixels.
"""

from __future__ import annotations

ROWS, COLUMNS = 4, 4  # instruction tiles of a warp
WARP_OUTPUTS, WARP_PIXELS = 16 * ROWS, 8 * COLUMNS
SUMS = 4 * ROWS * COLUMNS  # of a thread
WARPS_O, WARPS_P = 2, 2
OUTPUTS, PIXELS = WARPS_O * WARP_OUTPUTS, WARPS_P * WARP_PIXELS
THREADS = 32 * WARPS_O * WARPS_P

# A row of a slice, of one output channel or one pixel: 32 products of 16 bits, or 16 of float32.
WORDS = 16
SLICE_BYTES = 4 * WORDS
STEP = 8  # words that one instruction takes
# 20 words from row to row: the 8 rows that ldmatrix reads at once begin at banks 0, 20, 8, 28, 16, 4, 24 and 12, four
# banks each, so that none is asked twice.
PITCH = WORDS + 4

# Slices on their way or in use. Three take 46,080 bytes of shared memory, with the pixels' places 47,616: less than the
# 49,152 that a launch may use without asking.
STAGES = 3
STAGE = (OUTPUTS + PIXELS) * PITCH  # words

# Sums on their way out lie in the same memory, 8 words more than the pixels from one output channel to the next: the 8
# rows that a warp writes at once begin at banks 0, 8, 16 and 24, two words per thread.
PARKING_PITCH = PIXELS + 8
