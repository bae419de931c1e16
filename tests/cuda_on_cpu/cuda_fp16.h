// CUDA's half precision on the CPU: conversions that round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half { uint16_t bits; };

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(float(fraction), -24)
                                            : std::ldexp(float(fraction | 1024), exponent - 25);
    return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}
