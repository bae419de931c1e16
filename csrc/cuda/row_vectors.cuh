// A row in pieces of 16 bytes: what one load of a thread brings, unpacked to fp32, and derivatives packed for a store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace rlvr {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> constexpr int WIDTH = 16 / sizeof(T);  // elements in 16 bytes

// A vector of which only the first `count` elements exist, or that is not aligned; -inf takes the place of the others.
template <class T>
__device__ uint4 load_part(const T* from, int count) {
    T values[WIDTH<T>];
#pragma unroll
    for (int i = 0; i < WIDTH<T>; ++i) values[i] = i < count ? from[i] : narrow<T>(-INFINITY);
    uint4 vector;
    memcpy(&vector, values, sizeof vector);
    return vector;
}

template <class T>
__device__ void unpack(uint4 vector, float (&raw)[WIDTH<T>]) {
    T values[WIDTH<T>];
    memcpy(values, &vector, sizeof vector);
#pragma unroll
    for (int i = 0; i < WIDTH<T>; ++i) raw[i] = widen(values[i]);
}

template <class T, int N>
__device__ void store_part(T* to, const float (&values)[N], int count) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) to[i] = narrow<T>(values[i]);
}

template <class T, int N>
__device__ void store_whole(T* to, const float (&values)[N]) {
    constexpr int BYTES = N * sizeof(T);  // 8, 16 or 32
    using Word = std::conditional_t<BYTES == 8, uint2, uint4>;
    T packed[N];
#pragma unroll
    for (int i = 0; i < N; ++i) packed[i] = narrow<T>(values[i]);
    Word words[BYTES / sizeof(Word)];
    memcpy(words, packed, BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / static_cast<int>(sizeof(Word)); ++i) reinterpret_cast<Word*>(to)[i] = words[i];
}

}  // namespace rlvr
