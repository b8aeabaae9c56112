"""The compiled part of ``winograd`` that both orders of channels share: tasks, strips and weights.

A task is a strip of tiles and some output channels; ``winograd_planes`` and ``winograd_pixels`` say what is done to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpuconv.backends.numba_cpu import runtime, winograd_weights
from gpuconv.backends.numba_cpu.vectors import Lanes, get
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS, TILE

# The table of arguments.
X, WEIGHTS, Y, SCRATCH, FINISH, FILL = range(runtime.ARRAYS)
(
    SXN, SXG, SXC, SXH, SXW, SYN, SYG, SYO, SYH, SYW,  # steps in bytes
    RAW, SKG, SKO, SKC, SKP, SKQ,  # whether the weights are still to be transformed, and their steps in bytes
    N, G, C, O, H, W, OH, OW, TOP, LEFT, KC,
    HIGH, WIDE, OUTPUTS, AT_ONCE,  # a strip's rows and columns of tiles, output channels of a task and of a step of it
    INPUT_STEP, SUM_STEP, WEIGHT_STEP, OWN_STEP, BEFORE, PER_THREAD,  # sizes in elements
    OWN,  # what follows is for one order of channels
) = range(runtime.ARRAYS, runtime.ARRAYS + 38)  # fmt: skip


class Steps(NamedTuple):
    """What is done to a strip of tiles [i0, i1) × [j0, j1), as functions of the table of arguments and

    transform(mine, inputs, source, i0, i1, j0, j1): all channels of the image at ``source``, to ``inputs``;
    multiply(sums, weights, step, inputs, panels, tiles): the sums over the channels, for some panels of outputs;
    finish(mine, sums, target, first, outputs, i0, i1, j0, j1): the transforms of the sums, to channels of the result at
    ``target``, of which the bias of the first is at ``first``.

    ``mine`` is BEFORE elements of memory for their own use.
    """

    transform: Any
    multiply: Any
    finish: Any


def kernel(lanes: Lanes, rows: int, unit: int, steps: Steps) -> Callable[..., None]:
    """The kernel for panels of ``rows`` output channels, of which a multiple of ``unit`` is summed."""
    size = lanes.size
    panel = winograd_weights.panel(lanes, rows)
    transform, multiply, finished = steps

    def winograd(arguments, thread, threads):
        high, wide = get(arguments, HIGH), get(arguments, WIDE)
        ob, at_once = get(arguments, OUTPUTS), get(arguments, AT_ONCE)
        C_, O_, G_, OH_, OW_ = (
            get(arguments, C), get(arguments, O), get(arguments, G), get(arguments, OH), get(arguments, OW),
        )  # fmt: skip
        tiles_down, tiles_across = (OH_ + TILE - 1) // TILE, (OW_ + TILE - 1) // TILE
        down, across = (tiles_down + high - 1) // high, (tiles_across + wide - 1) // wide
        outputs, padded = (O_ + ob - 1) // ob, (O_ + unit - 1) // unit * unit
        step, raw, sko, own_step = (
            get(arguments, WEIGHT_STEP), get(arguments, RAW), get(arguments, SKO), get(arguments, OWN_STEP),
        )  # fmt: skip
        mine = get(arguments, SCRATCH) + size * thread * get(arguments, PER_THREAD)
        inputs = mine + size * get(arguments, BEFORE)
        sums = inputs + size * POINTS * get(arguments, INPUT_STEP)
        own = sums + size * POINTS * get(arguments, SUM_STEP)
        beside = own + size * POINTS * own_step
        before, kept = -1, -1
        strips = get(arguments, N) * G_ * down * across
        tasks = strips * outputs
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            strip, o0 = task % strips, task // strips * ob
            row, column = strip // across % down, strip % across
            n, g = strip // (across * down) // G_, strip // (across * down) % G_
            # Strips of equal shares, so that threads get equal shares of them.
            i0, i1 = row * tiles_down // down, (row + 1) * tiles_down // down
            j0, j1 = column * tiles_across // across, (column + 1) * tiles_across // across
            if strip != before:
                before = strip
                source = get(arguments, X) + n * get(arguments, SXN) + g * get(arguments, SXG)
                transform(arguments, mine, inputs, source, i0, i1, j0, j1)
            target = get(arguments, Y) + n * get(arguments, SYN) + g * get(arguments, SYG)
            end = min(O_, o0 + ob)
            for o1 in range(o0, end, at_once):
                here = min(at_once, end - o1)
                panels = (here + unit - 1) // unit * unit // rows
                if not raw:
                    weight = get(arguments, WEIGHTS) + size * (g * POINTS * step + o1 * C_)
                    multiply(arguments, sums, weight, step, inputs, panels, (i1 - i0) * (j1 - j0))
                else:
                    if kept != g * O_ + o1:
                        kept = g * O_ + o1
                        at = get(arguments, WEIGHTS) + g * get(arguments, SKG) + o1 * sko
                        for o in range(panels):
                            panel(
                                own + size * o * rows * C_, beside, at + o * rows * sko,
                                max(min(rows, here - o * rows), 0), C_, sko, get(arguments, SKC), get(arguments, SKP),
                                get(arguments, SKQ), own_step,
                            )  # fmt: skip
                    multiply(arguments, sums, own, own_step, inputs, panels, (i1 - i0) * (j1 - j0))
                bias = get(arguments, FINISH) + size * (2 + unit + g * padded + o1)
                finished(arguments, mine, sums, target + o1 * get(arguments, SYO), bias, here, i0, i1, j0, j1)

    return winograd
