// The product that everything is made of: a register tile of RLVR_ROWS scalars x 2 vectors, summed over a depth.
#pragma once

#include "lanes.h"

namespace {

constexpr int TILE = ROWS * BLOCK;

// tile[ROWS][BLOCK] (+)= sum over k of scalars[i * row_stride + k * depth_stride] vectors[k][BLOCK]. Each call sums
// from zero and is added as a whole: rounding grows with the square root of the longest chain, not of the whole depth.
template <bool ACCUMULATE>
inline __attribute__((always_inline)) void tile_product(const float* __restrict vectors,
                                                        const float* __restrict scalars, int64_t row_stride,
                                                        int64_t depth_stride, int64_t depth, float* __restrict tile) {
    Vec sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        const Vec left = load(vectors + k * BLOCK), right = load(vectors + k * BLOCK + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Vec scalar = splat(scalars[i * row_stride + k * depth_stride]);
            sum[i][0] += left * scalar;
            sum[i][1] += right * scalar;
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        float* row = tile + i * BLOCK;
        store(row, ACCUMULATE ? load(row) + sum[i][0] : sum[i][0]);
        store(row + LANES, ACCUMULATE ? load(row + LANES) + sum[i][1] : sum[i][1]);
    }
}

// Of ROWS rows of a matrix, `stride` from row to row, with its columns as depth.
template <bool ACCUMULATE>
__attribute__((noinline)) void multiply_rows(const float* vectors, const float* rows, int64_t stride, int64_t depth,
                                             float* tile) {
    tile_product<ACCUMULATE>(vectors, rows, stride, 1, depth, tile);
}

// Of ROWS columns of a matrix, `stride` from row to row, with its rows as depth.
template <bool ACCUMULATE>
__attribute__((noinline)) void multiply_columns(const float* vectors, const float* columns, int64_t stride,
                                                int64_t depth, float* tile) {
    tile_product<ACCUMULATE>(vectors, columns, 1, stride, depth, tile);
}

}  // namespace
