// Softmax statistics of the off-target logits, lane by lane, and their combination over vocabulary splits.
#pragma once

#include "head_pass.h"
#include "logits.h"

namespace {

using rlvr::HeadPass;

// Running statistics of the off-target logits, one lane per token: largest logit m, then with x = z - m and e = exp(x)
// the sums of e, e x, e^2 and (e f)^2, f = dz/draw; and the target's own logit.
enum Stat { MAX, SUM, SUM_X, SUM_SQ, SUM_SLOPE_SQ, TARGET, N_STATS };

// Reduce one tile of `rows` raw products into the running statistics [N_STATS][BLOCK]; with `kept`, also leave the
// off-target z of each row at kept[row * kept_stride + lane] (FLOOR at the target).
template <bool CAPPED>
void reduce(const Logits& logits, const float* tile, const float* bias, int rows, int32_t first_row,
            const int32_t* targets, float* stats, float* kept, int64_t kept_stride) {
    for (int half = 0; half < BLOCK; half += LANES) {
        IVec target;
        std::memcpy(&target, targets + half, sizeof target);
        Vec z[ROWS];
        Vec target_z = load(stats + TARGET * BLOCK + half), tile_max = splat(FLOOR);
        for (int i = 0; i < rows; ++i) {
            Vec value = load(tile + i * BLOCK + half);
            if (bias) value += splat(bias[i]);
            value = logits.z<CAPPED>(value);
            const IVec is_target = target == (first_row + i);
            target_z = is_target ? value : target_z;
            z[i] = is_target ? splat(FLOOR) : value;
            tile_max = maximum(tile_max, z[i]);
            if (kept) store(kept + i * kept_stride + half, z[i]);
        }
        const Vec old_max = load(stats + MAX * BLOCK + half), new_max = maximum(old_max, tile_max);
        Vec sum{}, sum_x{}, sum_sq{}, sum_slope_sq{};
        for (int i = 0; i < rows; ++i) {
            const Vec x = z[i] - new_max, e = exp_nonpositive(x);
            sum += e;
            sum_x += e * maximum(splat(EXP_UNDERFLOW), x);
            sum_sq += e * e;
            if (CAPPED) {
                const Vec slope = logits.slope<CAPPED>(z[i]), weighted = e * slope;
                sum_slope_sq += e > Vec{} ? weighted * weighted : Vec{};
            }
        }
        const Vec shift = maximum(old_max - new_max, splat(2 * EXP_UNDERFLOW)), scale = exp_nonpositive(shift);
        const Vec old_sum = load(stats + SUM * BLOCK + half);
        store(stats + MAX * BLOCK + half, new_max);
        store(stats + SUM * BLOCK + half, old_sum * scale + sum);
        store(stats + SUM_X * BLOCK + half, (load(stats + SUM_X * BLOCK + half) + old_sum * shift) * scale + sum_x);
        store(stats + SUM_SQ * BLOCK + half, load(stats + SUM_SQ * BLOCK + half) * (scale * scale) + sum_sq);
        if (CAPPED) {
            float* cell = stats + SUM_SLOPE_SQ * BLOCK + half;
            store(cell, load(cell) * (scale * scale) + sum_slope_sq);
        }
        store(stats + TARGET * BLOCK + half, target_z);
    }
}

// Combine the vocabulary splits of one token, in double and in a fixed order, and put the target back.
// partials: [n_splits][N_STATS] with `stride` floats from split to split and `lane_stride` from statistic to statistic.
void finish_token(const HeadPass& a, const Logits& logits, const float* partials, int64_t n_splits, int64_t stride,
                  int64_t lane_stride, int64_t token) {
    double top = FLOOR, target = FLOOR;
    for (int64_t s = 0; s < n_splits; ++s) {
        const float* p = partials + s * stride;
        if (p[SUM * lane_stride] != 0 && p[MAX * lane_stride] > top) top = p[MAX * lane_stride];
        if (p[TARGET * lane_stride] > target) target = p[TARGET * lane_stride];
    }
    const double reference = target > top ? target : top;
    double sum = 0, sum_x = 0, sum_sq = 0, sum_slope_sq = 0;
    for (int64_t s = 0; s < n_splits; ++s) {
        const float* p = partials + s * stride;
        if (p[SUM * lane_stride] == 0) continue;
        const double shift = p[MAX * lane_stride] - reference, scale = std::exp(shift);
        sum += scale * p[SUM * lane_stride];
        sum_x += scale * (p[SUM_X * lane_stride] + shift * p[SUM * lane_stride]);
        sum_sq += scale * scale * p[SUM_SQ * lane_stride];
        sum_slope_sq += scale * scale * p[SUM_SLOPE_SQ * lane_stride];
    }
    const bool absent = target <= FLOOR;  // masked, or in another shard of the vocabulary: no probability here
    const double target_x = target - reference, target_e = absent ? 0.0 : std::exp(target_x), total = sum + target_e;
    const double log_total = target_e == 1.0 ? std::log1p(sum) : std::log(total);
    const double p_target = target_e / total, off_mass = sum / total;
    const double slope = absent ? 0.0 : logits.slope(target);
    const double uncapped_slope = a.inverse_temperature;
    const double off_slope_sq = a.softcap > 0 ? sum_slope_sq : sum_sq * uncapped_slope * uncapped_slope;
    a.logp[token] = static_cast<float>(absent ? -HUGE_VAL : target_x - log_total);
    a.lse[token] = static_cast<float>(reference + log_total);
    const double mean_x = (sum_x + (absent ? 0.0 : target_x * target_e)) / total, entropy = log_total - mean_x;
    a.entropy[token] = static_cast<float>(entropy > 0 ? entropy : (entropy <= 0 ? 0.0 : entropy));
    a.sum_p_sq[token] = static_cast<float>(sum_sq / (total * total) + p_target * p_target);
    a.score_sq[token] = static_cast<float>(slope * slope * off_mass * off_mass + off_slope_sq / (total * total));
    a.off_mass[token] = static_cast<float>(off_mass);
}

}  // namespace
