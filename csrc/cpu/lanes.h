// Vectors of RLVR_LANES floats and the exponentials on them; the register tile of RLVR_ROWS x 2 of them.
#pragma once

#include "kernels_system.h"

namespace {

constexpr int LANES = RLVR_LANES;
constexpr int ROWS = RLVR_ROWS;   // of a register tile,
constexpr int BLOCK = 2 * LANES;  // and its columns
constexpr int64_t K_BLOCK = 256;  // product depth per visit of a register tile: its operands stay in L1
constexpr float FLOOR = -3.0e38f;     // stands for "no logit yet" and for masked vocabulary; finite, so x - FLOOR is too
constexpr float EXP_UNDERFLOW = -87.0f;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be a sum: it turns -0 into 0
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // a NaN in b survives

// exp for x <= 0, exact 1 at 0, exact 0 below EXP_UNDERFLOW; relative error below 2e-7.
inline Vec exp_nonpositive(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
    const Vec clamped = maximum(splat(EXP_UNDERFLOW), x);
    const Vec shifted = clamped * splat(1.44269504088896f) + magic;
    const Vec n = shifted - magic;
    const Vec r = (clamped - n * splat(0.693145751953125f)) - n * splat(1.42860682030941723212e-6f);
    Vec p = splat(1.3981999e-3f);
    p = p * r + splat(8.3334519e-3f);
    p = p * r + splat(4.1665795e-2f);
    p = p * r + splat(1.6666665e-1f);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    IVec bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;  // the magic number's own bits leave through the top
    std::memcpy(&p, &bits, sizeof p);
    return x < splat(EXP_UNDERFLOW) ? Vec{} : p;
}

// Relative error below 3e-7: an odd polynomial (Cephes tanhf) below 0.625, where 1 - e would cancel.
inline Vec tanh_vec(Vec x) {
    const Vec magnitude = x < Vec{} ? -x : x;
    const Vec e = exp_nonpositive(magnitude * splat(-2.0f));
    const Vec t = (splat(1.0f) - e) / (splat(1.0f) + e);
    const Vec square = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * square + splat(2.06390887954e-2f);
    p = p * square + splat(-5.37397155531e-2f);
    p = p * square + splat(1.33314422036e-1f);
    p = p * square + splat(-3.33332819422e-1f);
    const Vec small = p * square * x + x;
    return magnitude < splat(0.625f) ? small : (x < Vec{} ? -t : t);
}

}  // namespace
