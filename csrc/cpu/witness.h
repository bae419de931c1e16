// A few entries of an outer-product gradient, in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "elements.h"

namespace rlvr {

// seen[k] += sum over t of b[t][rows[k]] a[t][columns[k]], size[k] += the sum of the magnitudes of these terms.
struct OuterEntries {
    DType b_dtype, a_dtype;
    const void *b, *a;  // rows b_stride and a_stride elements apart
    int64_t n_rows, b_stride, a_stride, n_entries;
    const int64_t *rows, *columns;  // [n_entries]
    double *seen, *size;            // [n_entries]
};

template <class B, class A>
void outer_entries_typed(const OuterEntries& o) {
    for (int64_t t = 0; t < o.n_rows; ++t) {
        const B* b = static_cast<const B*>(o.b) + t * o.b_stride;
        const A* a = static_cast<const A*>(o.a) + t * o.a_stride;
        for (int64_t k = 0; k < o.n_entries; ++k) {
            const double term = static_cast<double>(to_float(b + o.rows[k])) * to_float(a + o.columns[k]);
            o.seen[k] += term;
            o.size[k] += std::fabs(term);
        }
    }
}

template <class B>
void outer_entries_of(const OuterEntries& o) {
    switch (o.a_dtype) {
        case DType::float32: return outer_entries_typed<B, float>(o);
        case DType::bfloat16: return outer_entries_typed<B, BFloat16>(o);
        case DType::float16: return outer_entries_typed<B, Float16>(o);
    }
}

inline void outer_entries(const OuterEntries& o) {
    switch (o.b_dtype) {
        case DType::float32: return outer_entries_of<float>(o);
        case DType::bfloat16: return outer_entries_of<BFloat16>(o);
        case DType::float16: return outer_entries_of<Float16>(o);
    }
}

}  // namespace rlvr
