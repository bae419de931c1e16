// Softmax statistics of the held-out logits of a row, in base 2, and the results that follow from them.
// The formulas are told in kernels/combine_stats.py; the sampled token is held out throughout.
#pragma once

#include <cfloat>
#include <cmath>

namespace rlvr {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
// 2^-200 is 0 in fp32: bounding an exponent by it changes nothing except 0 * (-inf).
constexpr float UNDERFLOW_EXPONENT = -200.0f;

// z in base 2 and dz/draw without the temperature.
struct Logit {
    float z, slope;
};

template <bool CAPPED>
struct LogitMap {
    float scale, cap, inverse_cap;

    __host__ __device__ LogitMap(float inverse_temperature, float softcap)
        : scale(LOG2_E * inverse_temperature), cap(softcap), inverse_cap(CAPPED ? 1.0f / softcap : 0.0f) {}

    // With u = e^(-2|raw / cap|): tanh = (1 - u) / (1 + u) up to its sign, its derivative 4u / (1 + u)^2, which keeps
    // its digits where 1 - tanh^2 loses them. Near 0, where 1 - u loses them, tanh is its series. -inf stays there.
    __host__ __device__ Logit operator()(float raw) const {
        if constexpr (!CAPPED) return {raw * scale, 1.0f};
        const float share = raw * inverse_cap, square = share * share;
        const float u = exp2f(-2.0f * LOG2_E * fabsf(share)), ratio = 1.0f / (1.0f + u);
        const float series =
            -0.333333333f + square * (0.133333333f + square * (-0.0539682540f + square * 0.0218694885f));
        const float far = copysignf((cap - cap * u) * ratio, raw);
        const float capped = square < 0.09f ? raw + raw * square * series : far;
        return {(raw == -INFINITY ? raw : capped) * scale, 4.0f * u * ratio * ratio};
    }
};

// With x = z - maximum and e = 2^x: the sums of e, e x, e^2 and (e f)^2.
struct Statistics {
    float maximum, mass, first, square, slope_square;

    // The maximum is not -inf, so that no difference is NaN; no finite logit is below it.
    __host__ __device__ static Statistics none() { return {-FLT_MAX, 0.0f, 0.0f, 0.0f, 0.0f}; }

    __host__ __device__ void move_to(float new_maximum) {
        const float shift = maximum - new_maximum, scale = exp2f(shift);
        first = scale * (first + fmaxf(shift, UNDERFLOW_EXPONENT) * mass);
        mass *= scale;
        square *= scale * scale;
        slope_square *= scale * scale;
        maximum = new_maximum;
    }

    // Without slopes, all of them 1, `slope_square` is left alone: it is `square`.
    template <bool SLOPES, int N>
    __host__ __device__ void add(const Logit (&logits)[N]) {
        float top = maximum;
#pragma unroll
        for (int i = 0; i < N; ++i) top = fmaxf(top, logits[i].z);
        move_to(top);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float x = logits[i].z - top, e = exp2f(x);
            mass += e;
            first += e * fmaxf(x, UNDERFLOW_EXPONENT);
            square += e * e;
            if constexpr (SLOPES) slope_square += e * e * logits[i].slope * logits[i].slope;
        }
    }

    __host__ __device__ void merge(Statistics other) {
        const float top = fmaxf(maximum, other.maximum);
        move_to(top);
        other.move_to(top);
        mass += other.mass;
        first += other.first;
        square += other.square;
        slope_square += other.slope_square;
    }
};

struct TokenResults {
    float logp, lse, entropy, sum_p_sq, score_sq, off_mass;
    float at_target;  // dlogp/draw of the sampled token
    float others;     // off_mass / (mass * temperature): dlogp/draw of any other is -others * e * slope
};

// `target` is at -inf unless the sampled token is `here`: it may be in another shard of the vocabulary.
__host__ __device__ inline TokenResults token_results(const Statistics& statistics, Logit target, bool here,
                                                      float inverse_temperature) {
    // Without another token in the vocabulary there is no maximum; off_mass, its weight, is 0 then. A NaN mass counts
    // as others and reaches the results.
    const bool has_others = statistics.mass != 0.0f;
    const float mass = has_others ? statistics.mass : 1.0f;
    const float maximum = has_others ? statistics.maximum : -INFINITY;
    const float log_mass = has_others ? log2f(mass) : -INFINITY;
    const float log_odds = here ? target.z - maximum - log_mass : -INFINITY;
    const float smaller = exp2f(-fabsf(log_odds)), tail = log1pf(smaller);
    const bool likely = log_odds >= 0.0f;
    const float p = (likely ? 1.0f : smaller) / (1.0f + smaller);
    const float off_mass = (likely ? smaller : 1.0f) / (1.0f + smaller), off_per_mass = off_mass / mass;

    TokenResults r;
    // fminf and fmaxf would drop a NaN.
    r.logp = (likely ? 0.0f : log_odds) * LN_2 - tail;
    r.lse = (likely ? target.z : maximum + log_mass) * LN_2 + tail;
    const float above_maximum = has_others ? (likely ? target.z - maximum : log_mass) * LN_2 + tail : 0.0f;
    r.entropy = off_mass * (above_maximum - statistics.first / mass * LN_2) - (p == 0.0f ? 0.0f : p * r.logp);
    r.sum_p_sq = p * p + statistics.square * off_per_mass * off_per_mass;
    r.off_mass = off_mass;
    r.at_target = here ? off_mass * target.slope * inverse_temperature : 0.0f;
    r.others = off_per_mass * inverse_temperature;
    r.score_sq = r.at_target * r.at_target + statistics.slope_square * r.others * r.others;
    return r;
}

}  // namespace rlvr
