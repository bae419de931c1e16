// How raw products become logits.
#pragma once

#include "lanes.h"

namespace {

struct Logits {  // z = cap * tanh(raw / cap) / T and its slope dz/draw
    Logits(float inverse_temperature, float softcap)
        : scale(softcap > 0 ? softcap * inverse_temperature : inverse_temperature),
          inverse_cap(softcap > 0 ? 1.0f / softcap : 0.0f), inverse_temperature(inverse_temperature) {}
    template <bool CAPPED> Vec z(Vec raw) const {
        const Vec value = CAPPED ? tanh_vec(raw * splat(inverse_cap)) : raw;
        const Vec z = maximum(splat(FLOOR), value * splat(scale));
        return CAPPED ? (raw < splat(FLOOR) ? splat(FLOOR) : z) : z;  // -inf stays out of the vocabulary
    }
    template <bool CAPPED> Vec slope(Vec z) const {
        if (!CAPPED) return splat(inverse_temperature);
        const Vec tanh_value = maximum(splat(-1.0f), z / splat(scale));  // FLOOR has slope 0
        return (splat(1.0f) - tanh_value * tanh_value) * splat(inverse_temperature);
    }
    double slope(double z) const {
        if (inverse_cap == 0.0f) return inverse_temperature;
        const double tanh_value = z / scale;
        return (1.0 - tanh_value * tanh_value) * inverse_temperature;
    }
    float scale, inverse_cap, inverse_temperature;
};

}  // namespace
