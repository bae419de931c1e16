// CountSketch of the rows of a matrix: arguments and entry points.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rlvr {

// folded[t][c] = sum of sign(i) x[t][i - first] over the features i of [first, first + width) with column(i) = c.
// Features come in blocks of k: column(i) = (i mod k + a hash of i / k) mod k, sign(i) is another hash of i; see sketch.py.
struct FoldRows {
    DType dtype;
    const void* x;  // [n_rows, width], rows `stride` elements apart
    int64_t n_rows, width, stride, first, k;
    uint64_t salt;
    float* folded;  // [n_rows, k], overwritten
    int n_threads;
};

void fold_rows_baseline(const FoldRows&);
#if defined(__x86_64__)
void fold_rows_avx2(const FoldRows&);
void fold_rows_avx512(const FoldRows&);
#endif

}  // namespace rlvr
