// The product's register tile: RLVR_ROWS vocabulary entries x 2 vectors of tokens.
//
// Weight entries are broadcast straight from the row-major lm_head, nothing of it is repacked; the tokens' hidden states
// are packed lane-wise once per tile of the grid.
#pragma once

#include "elements.h"
#include "head_pass.h"
#include "lanes.h"

namespace {

// hidden[first : first + count] -> packed[block][k][BLOCK], zero beyond the last token.
template <class T>
void pack_hidden(const T* hidden, int64_t width, int64_t first, int64_t count, int64_t n_blocks, float* packed) {
    for (int64_t block = 0; block < n_blocks; ++block) {
        float* target = packed + block * width * BLOCK;
        for (int64_t k0 = 0; k0 < width; k0 += 16) {  // 16 columns at a time keep the written lines in L1
            const int64_t k1 = k0 + 16 < width ? k0 + 16 : width;
            for (int lane = 0; lane < BLOCK; ++lane) {
                const int64_t row = block * BLOCK + lane;
                const T* source = hidden + (first + row) * width;
                for (int64_t k = k0; k < k1; ++k) target[k * BLOCK + lane] = row < count ? to_float(source + k) : 0.0f;
            }
        }
    }
}

// ROWS rows of the lm_head as fp32: the rows themselves where that is what they are, else a converted copy.
template <class T>
const float* weight_rows(const T* weight, int64_t width, int64_t first, int64_t count, float* scratch) {
    const T* source = weight + first * width;
    if (sizeof(T) == 4 && count == ROWS) return reinterpret_cast<const float*>(source);
    for (int64_t i = 0; i < count * width; ++i) scratch[i] = to_float(source + i);
    std::memset(scratch + count * width, 0, static_cast<size_t>((ROWS - count) * width) * 4);
    return scratch;
}

// tile[ROWS][BLOCK] (+)= weight rows . packed hidden states over `depth` columns. Each call sums from zero and is added
// as a whole: rounding grows with the square root of the longest chain, not of the whole depth.
template <bool ACCUMULATE>
__attribute__((noinline)) void multiply(const float* __restrict packed, const float* __restrict weight,
                                        int64_t weight_stride, int64_t depth, float* __restrict tile) {
    Vec sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = Vec{};
    for (int64_t k = 0; k < depth; ++k) {
        const Vec left = load(packed + k * BLOCK), right = load(packed + k * BLOCK + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Vec w = splat(weight[i * weight_stride + k]);
            sum[i][0] += left * w;
            sum[i][1] += right * w;
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        float* row = tile + i * BLOCK;
        store(row, ACCUMULATE ? load(row) + sum[i][0] : sum[i][0]);
        store(row + LANES, ACCUMULATE ? load(row + LANES) + sum[i][1] : sum[i][1]);
    }
}

}  // namespace
