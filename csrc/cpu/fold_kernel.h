// CountSketch of rows: one multiply-add per entry, where a product with the [width, k] matrix of the map has k.
//
// Included once per instruction set, as head_pass_kernel.h. A block of k features is rotated as a whole, so it is added to
// 2 k accumulators (the second half wraps around) as whole vectors, wherever it starts. Bytes: every entry once.
// A few blocks of a row, then of the next: entries come in pieces of 1 KB (k = 32), and a row's sums are out of the
// processor's store buffer when its turn comes again. One core of an EPYC (Zen 5) under load, ns an entry in rows of
// 384, 1024 and 8192: 0.22, 0.22, 0.25; without the prefetch 0.33, 0.50, 0.46; one block of 64 rows in turn 0.28, 0.90,
// 0.96 (rows 4 KB apart share cache sets); the product with the map (MKL) 0.73, 0.88, 1.09.
// Numerics: fp32, sums in ascending order of features in each half, the same on every instruction set, bit by bit.
#pragma once

#include "elements.h"
#include "fold.h"
#include "lanes.h"
#include "threads.h"

namespace fold {
namespace {

constexpr size_t VISIT = 8;    // blocks of a row at a time,
constexpr int64_t GROUP = 16;  // rows in turn,
constexpr int64_t AHEAD = 4;   // and so many rows later the one to fetch, which the processor does not do by itself

inline uint64_t mixed(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

inline uint64_t hash(int64_t number, uint64_t salt) { return mixed(mixed(static_cast<uint64_t>(number) + salt) + 1); }

struct Run {  // of features that are neighbours in x and in the accumulators
    int64_t first, count, target;
};

struct Map {
    explicit Map(const rlvr::FoldRows& a) : signs(a.width) {
        for (int64_t i = 0; i < a.width; ++i) signs.data[i] = hash(a.first + i, a.salt) >> 40 & 1 ? -1.0f : 1.0f;
        for (int64_t i = 0; i < a.width;) {
            const int64_t block = (a.first + i) / a.k, offset = (a.first + i) % a.k;
            const int64_t rotation = (hash(~block, a.salt) & 0x7FFFFFFF) % a.k;
            const int64_t count = a.k - offset < a.width - i ? a.k - offset : a.width - i;
            runs.push_back({i, count, offset + rotation});
            i += count;
        }
    }
    Aligned signs;
    std::vector<Run> runs;
};

inline void add_signed(const float* x, const float* signs, float* target, int64_t count) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) store(target + j, load(target + j) + load(signs + j) * load(x + j));
    for (; j < count; ++j) target[j] += signs[j] * x[j];
}

template <class T>
inline void add_signed(const T* x, const float* signs, float* target, int64_t count) {
    for (int64_t j = 0; j < count; ++j) target[j] += signs[j] * to_float(x + j);
}

template <class T>
void run_typed(const rlvr::FoldRows& a) {
    const Map map(a);
    const int64_t group = clamp_multiple(8192 / (2 * a.k), 4, GROUP, 4), n_groups = ceil_div(a.n_rows, group);
    const int n_threads = useful_threads(a.n_threads, 2.0 * a.n_rows * a.width);
    Aligned all(n_threads * group * 2 * a.k);
    std::atomic<int64_t> next{0};
    run_threads(n_threads, [&](int thread) {
        float* const sums = all.data + thread * group * 2 * a.k;
        for (int64_t g; (g = next.fetch_add(1)) < n_groups;) {
            const int64_t first = g * group, rows = a.n_rows - first < group ? a.n_rows - first : group;
            const T* const x = static_cast<const T*>(a.x) + first * a.stride;
            std::memset(sums, 0, static_cast<size_t>(rows * 2 * a.k) * 4);
            for (size_t start = 0; start < map.runs.size(); start += VISIT) {
                const size_t stop = start + VISIT < map.runs.size() ? start + VISIT : map.runs.size();
                const int64_t column = map.runs[start].first, bytes = (stop - start) * a.k * sizeof(T);
                for (int64_t t = 0; t < rows; ++t) {
                    const int64_t later = first + t + AHEAD < a.n_rows ? t + AHEAD : t;
                    const auto* ahead = reinterpret_cast<const char*>(x + later * a.stride + column);
                    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
                    for (size_t i = start; i < stop; ++i)
                        add_signed(x + t * a.stride + map.runs[i].first, map.signs.data + map.runs[i].first,
                                   sums + t * 2 * a.k + map.runs[i].target, map.runs[i].count);
                }
            }
            for (int64_t t = 0; t < rows; ++t)
                for (int64_t c = 0; c < a.k; ++c)
                    a.folded[(first + t) * a.k + c] = sums[t * 2 * a.k + c] + sums[t * 2 * a.k + a.k + c];
        }
    });
}

void run(const rlvr::FoldRows& a) {
    switch (a.dtype) {
        case rlvr::DType::float32: return run_typed<float>(a);
        case rlvr::DType::bfloat16: return run_typed<BFloat16>(a);
        case rlvr::DType::float16: return run_typed<Float16>(a);
    }
}

}  // namespace
}  // namespace fold
