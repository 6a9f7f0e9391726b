"""Which tile a launch of the adapter kernels uses: a table, looked up by element type, bottleneck and row count.

Every entry is compiled ahead of time for sm_80, sm_90 and sm_100 by tests/kernels/test_aot.py, which checks
shared memory and spills too: that a new entry builds and fits needs no GPU to be known. Where speeds have not been
measured the entries follow a traffic model: each program reads all adapter weights from L2, hence large tiles for many
rows; few rows want many short programs.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple


class Config(NamedTuple):
    """One launch configuration.

    split      False: one launch, the whole bottleneck in registers. True: two launches that meet at the r-wide tensor.
    block_m    rows per program
    block_k    chunk of d in the loop that reduces over d
    block_n    chunk of d in the loop that writes d-wide rows
    r1, r2     the bottleneck as tiles of powers of two, r1 + r2 >= r (r2 = 0: one tile); when split, r1 is the tile.
    fold       LayerNorm folded into the down weights (one pass over x); False: two passes, x normalised before the dot.
    """

    split: bool
    block_m: int
    block_k: int
    block_n: int
    r1: int
    r2: int
    num_warps: int
    num_stages: int
    fold: bool


# (largest r, r1, r2, tiles), r beyond the last entry is split; a tile is (row limit, block_m, block_k, block_n,
# num_warps, num_stages, fold). Folding costs a small launch of its own, which pays from 32768 rows on; in a site a
# little sooner, but not what Python takes to launch it.
# r = 96, and the backward of r = 192: the fastest of 22 to 45 tiles that do not spill, for 2048, 16384 and 65536 rows,
# on an H200 and an
# H100 (benchmarks/NOTES.md); the others follow.
FEW = (4096, 16, 64, 64, 4, 3, False)
_FORWARD = (FEW, (32768, 64, 64, 64, 4, 3, False), (None, 64, 64, 64, 4, 3, True))
HALF_FORWARD = (
    (16, 16, 0, _FORWARD),
    (32, 32, 0, _FORWARD),
    (64, 64, 0, _FORWARD),
    (128, 128, 0, _FORWARD),
    (192, 128, 64, ((3000, 16, 64, 64, 4, 2, False), (8000, 32, 64, 64, 4, 2, False), (None, 64, 64, 64, 8, 2, True))),
    (256, 256, 0, ((3000, 16, 64, 64, 4, 2, False), (None, 64, 64, 64, 8, 2, True))),
)
HALF_SPLIT = ((3000, 32, 64, 64, 4, 3, False), (None, 64, 64, 64, 8, 3, True))
HALF_SPLIT_R = 128

# 64 rows spill registers in the backward at r = 256; 256 + 32 would spill in both directions from 32 rows on. Up to r =
# 96 the bottleneck is 64 + 32: as fast as 128, which spills.
_BACKWARD = (FEW, (None, 64, 64, 64, 4, 3, False))
HALF_BACKWARD = (
    (16, 16, 0, _BACKWARD),
    (32, 32, 0, _BACKWARD),
    (64, 64, 0, _BACKWARD),
    (96, 64, 32, _BACKWARD),
    (128, 128, 0, (FEW, (None, 64, 64, 64, 8, 3, False))),
    (192, 128, 64, ((3000, 16, 64, 64, 4, 2, False), (None, 64, 64, 64, 8, 3, False))),
    (256, 256, 0, ((3000, 16, 64, 64, 4, 2, False), (None, 32, 64, 64, 8, 2, False))),
)

HALF_SITE_FORWARD = (
    *HALF_FORWARD[:3],
    (96, 64, 32, _FORWARD),
    *HALF_FORWARD[3:],
)
# The norm behind it takes registers: with 4 warps 64 rows spill beyond r = 96.
HALF_SITE_BACKWARD = (
    *HALF_BACKWARD[:5],
    (192, 128, 64, ((3000, 16, 64, 64, 4, 2, False), (None, 64, 64, 64, 8, 2, False))),
    *HALF_BACKWARD[6:],
)

# fp32 runs on the FMA units (true fp32, no tf32): small tiles, because both operands of a dot sit in registers.
FLOAT_FORWARD = (
    (16, 16, 0, ((3000, 16, 32, 32, 4, 2, False), (None, 32, 32, 32, 4, 2, False))),
    (32, 32, 0, ((3000, 16, 32, 32, 4, 2, False), (None, 32, 32, 32, 4, 2, False))),
    (64, 64, 0, ((3000, 16, 32, 32, 4, 2, False), (None, 32, 32, 32, 8, 2, False))),
    (128, 128, 0, ((3000, 16, 32, 32, 4, 2, False), (None, 32, 32, 32, 8, 2, False))),
    (192, 128, 64, ((3000, 16, 32, 32, 4, 2, False), (None, 32, 32, 32, 8, 2, False))),
)
FLOAT_BACKWARD = FLOAT_FORWARD
FLOAT_SPLIT = ((None, 64, 32, 32, 8, 2, False),)
FLOAT_SPLIT_R = 64

FOLD_TILE = (4, 1024)  # rows x columns of w_down per program of fold_weights
WEIGHT_GRADS_TILE = (32, 64)  # columns of d per program of weight_grads, columns of r per step

TABLE = {
    ("half", "forward"): (HALF_FORWARD, HALF_SPLIT, HALF_SPLIT_R),
    ("half", "backward"): (HALF_BACKWARD, HALF_SPLIT, HALF_SPLIT_R),
    ("half", "site_forward"): (HALF_SITE_FORWARD, HALF_SPLIT, HALF_SPLIT_R),
    ("half", "site_backward"): (HALF_SITE_BACKWARD, HALF_SPLIT, HALF_SPLIT_R),
    ("float", "forward"): (FLOAT_FORWARD, FLOAT_SPLIT, FLOAT_SPLIT_R),
    ("float", "backward"): (FLOAT_BACKWARD, FLOAT_SPLIT, FLOAT_SPLIT_R),
    ("float", "site_forward"): (FLOAT_FORWARD, FLOAT_SPLIT, FLOAT_SPLIT_R),
    ("float", "site_backward"): (FLOAT_BACKWARD, FLOAT_SPLIT, FLOAT_SPLIT_R),
}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and at least `least` (16: what a tensor-core dot takes)."""
    return max(least, 1 << (n - 1).bit_length())


def _tiles_for(kind: str, direction: str, r: int):
    """(split, r1, r2, tiles) of the table's entry for a bottleneck of r."""
    fused, split, split_r = TABLE[kind, direction]
    for limit, r1, r2, tiles in fused:
        if r <= limit:
            return False, r1, r2, tiles
    return True, split_r, 0, split


@cache
def _build(kind: str, direction: str, d: int, r: int, index: int) -> Config:
    split, r1, r2, tiles = _tiles_for(kind, direction, r)
    _, block_m, block_k, block_n, warps, stages, fold = tiles[index]
    widest = power_of_two(d)
    return Config(split, block_m, min(block_k, widest), min(block_n, widest), r1, r2, warps, stages, fold)


@lru_cache(maxsize=1024)
def select(kind: str, direction: str, d: int, r: int, rows: int) -> Config:
    """Semantics: the table's configuration for rows x d with a bottleneck of r; kind is "half" or "float"."""
    tiles = _tiles_for(kind, direction, r)[3]
    for index, tile in enumerate(tiles):
        if tile[0] is None or rows <= tile[0]:
            return _build(kind, direction, d, r, index)
    raise AssertionError(f"adapter_config: the table for {kind} {direction} r={r} has no entry without a row limit")
