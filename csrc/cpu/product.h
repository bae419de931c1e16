// The products of the head with hidden states: weight entries are broadcast straight from the row-major lm_head,
// nothing of it is repacked; the tokens' hidden states are packed lane-wise, one lane a token.
#pragma once

#include "elements.h"
#include "register_tile.h"

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
                const T* source = hidden + (first + (row < count ? row : 0)) * width;
                __builtin_prefetch(source + k1);
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

// tiles[block][ROWS][BLOCK] = ROWS rows of the lm_head . the packed hidden states of n_blocks blocks of tokens.
inline void multiply_tokens(const float* packed, const float* weight, int64_t width, int64_t n_blocks, float* tiles) {
    for (int64_t k = 0; k < width; k += K_BLOCK) {
        const int64_t depth = width - k < K_BLOCK ? width - k : K_BLOCK;
        const auto multiply = k ? multiply_rows<true> : multiply_rows<false>;
        for (int64_t block = 0; block < n_blocks; ++block)
            multiply(packed + (block * width + k) * BLOCK, weight + k, width, depth, tiles + block * TILE);
    }
}

}  // namespace
