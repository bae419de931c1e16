// Everything the head pass reports, from logits in memory, in one read; with a block also dlogp/draw of every entry.
//
// A cluster of thread blocks owns a row and keeps it in shared memory between the sweep that measures and the one that
// writes derivatives: 152064 fp32 logits, 608 KB, in four blocks. Blocks exchange 20 bytes each through distributed
// shared memory. Every thread keeps statistics of its own over the vectors that it alone loads, stores and reads back,
// so neither sweep has a barrier inside. Merges go in a fixed order: results repeat bit for bit. Where the row does not
// fit, or the chip has no clusters, one block sweeps memory twice.
//
// Traffic per entry: one read of the logits and, with a block, one write. Predictions for 8192 x 151936 at 4.3 TB/s:
// with an fp32 block in place 3.0 ms, 1.3 times the floor of 2.3, since a resident row leaves one thread block per
// multiprocessor, whose two sweeps do not overlap; statistics alone 1.15 times the floor of 1.16 ms as fp32, and 1.3
// times that of 0.58 ms as bf16, since 14 instructions per entry take 0.6 ms to issue. Not yet measured on a GPU.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "row_pass.h"
#include "row_statistics.cuh"
#include "row_vectors.cuh"

namespace rlvr {

struct NoBlock {};  // in place of the block's element type: statistics alone

constexpr int WARP = 32, MAX_WARPS = RESIDENT_THREADS / WARP;

// The thread blocks that share a row.
struct Cluster {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __device__ static int size() { return cooperative_groups::this_cluster().num_blocks(); }
    __device__ static int rank() { return cooperative_groups::this_cluster().block_rank(); }
    __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
    template <class T>
    __device__ static T* shared_of(T* own, int rank) {
        return cooperative_groups::this_cluster().map_shared_rank(own, rank);
    }
#else
    __device__ static int size() { return 1; }
    __device__ static int rank() { return 0; }
    __device__ static void sync() { __syncthreads(); }
    template <class T>
    __device__ static T* shared_of(T* own, int) { return own; }
#endif
};

__device__ inline Statistics warp_merge(Statistics own) {
#pragma unroll 1
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        Statistics other;
        other.maximum = __shfl_down_sync(0xffffffffu, own.maximum, distance);
        other.mass = __shfl_down_sync(0xffffffffu, own.mass, distance);
        other.first = __shfl_down_sync(0xffffffffu, own.first, distance);
        other.square = __shfl_down_sync(0xffffffffu, own.square, distance);
        other.slope_square = __shfl_down_sync(0xffffffffu, own.slope_square, distance);
        own.merge(other);
    }
    return own;  // complete in lane 0
}

// Every thread of the cluster gets the merged statistics, bit for bit the same. `exchange`: [MAX_WARPS] shared.
__device__ inline Statistics cluster_merge(Statistics own, Statistics* exchange) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    own = warp_merge(own);
    if (lane == 0) exchange[warp] = own;
    __syncthreads();
    if (warp == 0) {
        own = lane < static_cast<int>(blockDim.x) / WARP ? exchange[lane] : Statistics::none();
        own = warp_merge(own);
        if (lane == 0) exchange[0] = own;
    }
    Cluster::sync();
    Statistics total = *Cluster::shared_of(exchange, 0);
    for (int rank = 1; rank < Cluster::size(); ++rank) total.merge(*Cluster::shared_of(exchange, rank));
    Cluster::sync();  // no block may leave while another reads its shared memory
    return total;
}

// Element is the logits' type, Entry the block's or NoBlock.
template <class Element, class Entry, bool CAPPED>
__global__ void __launch_bounds__(RESIDENT_THREADS) row_pass_kernel(const RowPass a) {
    constexpr int N = WIDTH<Element>;
    constexpr int LOADS = CAPPED ? 2 : 4;  // in flight per thread; a soft cap needs the registers
    constexpr bool HAS_BLOCK = !std::is_same_v<Entry, NoBlock>;
    extern __shared__ uint4 resident_vectors[];
    __shared__ Statistics exchange[MAX_WARPS];

    const int64_t row = blockIdx.x / Cluster::size();
    const Element* logits = static_cast<const Element*>(a.logits) + row * a.logits_stride;
    const int target = static_cast<int>(a.tokens[row]);
    const LogitMap<CAPPED> map(a.inverse_temperature, a.softcap);
    // Before any block of the cluster may overwrite it: they pass cluster_merge first.
    const bool here = target >= 0;
    const Logit at_target = map(here ? widen(logits[target]) : -INFINITY);

    // This block's vectors: first those that lie inside the row and move in one piece, then any others.
    const int own_vectors = a.own_vectors, threads = blockDim.x;
    const int first_column = Cluster::rank() * own_vectors * N;
    const int inside = min((a.vocabulary - first_column) / N, own_vectors), whole = a.wide && inside > 0 ? inside : 0;
    const auto whole_vector = [&](int vector) {
        return *reinterpret_cast<const uint4*>(logits + first_column + vector * N);
    };
    const auto part_vector = [&](int vector) {
        const int column = first_column + vector * N;
        return load_part(logits + column, a.vocabulary - column);
    };

    Statistics own = Statistics::none();
    const auto measure = [&](int vector, uint4 packed) {
        const int column = first_column + vector * N;
        float raw[N];
        unpack<Element>(packed, raw);
        Logit entries[N];
#pragma unroll
        for (int j = 0; j < N; ++j) entries[j] = map(raw[j]);
        if (target >= column && target < column + N)  // rarely: spare the others two instructions per entry
#pragma unroll
            for (int j = 0; j < N; ++j) entries[j].z = column + j == target ? -INFINITY : entries[j].z;
        own.add<CAPPED>(entries);
        if constexpr (HAS_BLOCK)
            if (a.resident) resident_vectors[vector] = packed;
    };
    for (int start = threadIdx.x; start < whole; start += LOADS * threads) {
        uint4 packed[LOADS] = {};
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (start + i * threads < whole) packed[i] = whole_vector(start + i * threads);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (start + i * threads < whole) measure(start + i * threads, packed[i]);
    }
#pragma unroll 1
    for (int vector = whole + threadIdx.x; vector < own_vectors; vector += threads)
        measure(vector, part_vector(vector));

    Statistics total = cluster_merge(own, exchange);
    if constexpr (!CAPPED) total.slope_square = total.square;
    const TokenResults r = token_results(total, at_target, here, a.inverse_temperature);
    if (threadIdx.x == 0 && Cluster::rank() == 0) {
        const float columns[] = {r.logp, r.lse, r.entropy, r.sum_p_sq, r.score_sq, r.off_mass};
#pragma unroll
        for (int i = 0; i < 6; ++i) a.results[i * a.rows + row] = columns[i];
    }

    if constexpr (HAS_BLOCK) {
        Entry* block = static_cast<Entry*>(a.block) + row * a.block_stride;
        const auto differentiate = [&](int vector, uint4 packed, bool is_whole) {
            const int column = first_column + vector * N;
            float raw[N], derivative[N];
            unpack<Element>(packed, raw);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const Logit entry = map(raw[j]);
                derivative[j] = column + j == target ? r.at_target
                                                     : -r.others * exp2f(entry.z - total.maximum) * entry.slope;
            }
            if (is_whole)
                store_whole(block + column, derivative);
            else
                store_part(block + column, derivative, a.vocabulary - column);
        };
#pragma unroll LOADS
        for (int vector = threadIdx.x; vector < whole; vector += threads)
            differentiate(vector, a.resident ? resident_vectors[vector] : whole_vector(vector), true);
#pragma unroll 1
        for (int vector = whole + threadIdx.x; vector < own_vectors; vector += threads)
            differentiate(vector, a.resident ? resident_vectors[vector] : part_vector(vector), false);
    }
}

// The instantiation for a pair of types; `has_block` false: statistics alone.
using RowKernel = void (*)(RowPass);

template <class Element, class Entry>
RowKernel row_kernel_of(bool capped) {
    return capped ? row_pass_kernel<Element, Entry, true> : row_pass_kernel<Element, Entry, false>;
}

template <class Element>
RowKernel row_kernel_of(DType block, bool has_block, bool capped) {
    if (!has_block) return row_kernel_of<Element, NoBlock>(capped);
    switch (block) {
        case DType::Float32: return row_kernel_of<Element, float>(capped);
        case DType::BFloat16: return row_kernel_of<Element, __nv_bfloat16>(capped);
        default: return row_kernel_of<Element, __half>(capped);
    }
}

inline RowKernel row_kernel(DType logits, DType block, bool has_block, bool capped) {
    switch (logits) {
        case DType::Float32: return row_kernel_of<float>(block, has_block, capped);
        case DType::BFloat16: return row_kernel_of<__nv_bfloat16>(block, has_block, capped);
        default: return row_kernel_of<__half>(block, has_block, capped);
    }
}

}  // namespace rlvr
