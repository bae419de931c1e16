// Per-response weight gradients of one linear layer and their inner products: arguments and entry points.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rlvr {

// `rows` rows of the gradient of the layer's output, b, and of its input, a, that belong to `response`.
struct Piece {
    const void* b;  // [rows, d_out], rows b_stride elements apart
    const void* a;  // [rows, d_in], rows a_stride elements apart
    int64_t rows, b_stride, a_stride, response;
};

// G_i = sum of b_t a_t^T over the rows of response i's pieces; all <G_i, G_j>.
struct Segmented {
    DType dtype;
    const Piece* pieces;  // ascending in response
    int64_t n_pieces, n_responses, d_out, d_in;
    const float* direction;  // [d_out, d_in] or null
    float* gradient;         // [d_out, d_in] or null: sum_i G_i is added to it
    double* gram;            // [n_responses, n_responses], overwritten
    double* dots;            // [n_responses] <direction, G_i>, overwritten; null without a direction
    int n_threads;
};

void segmented_baseline(const Segmented&);
#if defined(__x86_64__)
void segmented_avx2(const Segmented&);
void segmented_avx512(const Segmented&);
#endif

}  // namespace rlvr
