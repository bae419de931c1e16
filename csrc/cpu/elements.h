// Numbers of every supported type as fp32, and aligned memory for them.
#pragma once

#include "kernels_system.h"

namespace {

inline float to_float(const float* p) { return *p; }

struct BFloat16 { uint16_t bits; };
inline float to_float(const BFloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x; std::memcpy(&x, &bits, 4); return x;
}

struct Float16 { uint16_t bits; };
inline float to_float(const Float16* p) {
    const uint32_t h = p->bits, magnitude = (h & 0x7fffu) << 13;
    float x; std::memcpy(&x, &magnitude, 4);
    x *= 5.192296858534828e33f;  // 2^112 moves the exponent bias, and makes subnormals normal
    uint32_t bits; std::memcpy(&bits, &x, 4);
    bits |= (h & 0x8000u) << 16 | ((h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    std::memcpy(&x, &bits, 4); return x;
}

struct Aligned {
    explicit Aligned(int64_t count)
        : data(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(count) * 4 + 127) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    ~Aligned() { std::free(data); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    float* data;
};

}  // namespace
