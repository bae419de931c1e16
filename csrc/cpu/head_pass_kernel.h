// The fused head pass: product, softmax statistics and per-response score sums in one sweep over the vocabulary.
//
// Included once per instruction set (head_pass_{baseline,avx2,avx512}.cpp) with RLVR_LANES floats per vector and
// RLVR_ROWS vocabulary rows per register tile, inside an anonymous namespace, so that no symbol is shared.
//
// One vector lane is one token. The product's register tile is ROWS vocabulary entries x 2 vectors of tokens: weight
// entries are broadcast straight from the row-major lm_head (nothing of it is repacked), the tokens' hidden states are
// packed lane-wise once per tile of the grid. A tile of logits leaves the registers into L1 and is reduced there, lane by
// lane, without a horizontal operation: the [N, V] matrix exists nowhere.
//
// Per logit: 2 D flops for the product and about 20 for the statistics (one exp), so the pass is bound by the FMA units
// for any D above a few dozen; bytes from memory are V D once per grid of tokens that fits the caches, plus N D.
//
// Numerics: the sampled token is held out of every sum, so that nothing is lost when its probability is nearly 1.
// Sums run in fp32 over at most one split of the vocabulary (a few hundred tiles), then in double.

#include "head_pass.h"
#include "head_pass_system.h"

namespace {

using rlvr::DType;
using rlvr::HeadPass;

constexpr int LANES = RLVR_LANES;
constexpr int ROWS = RLVR_ROWS;
constexpr int BLOCK = 2 * LANES;      // tokens per register tile
constexpr int64_t CHUNK_UNIT = 32;    // token chunks are multiples of it on every instruction set
constexpr int64_t K_BLOCK = 1024;     // product depth per visit of a register tile: BLOCK * K_BLOCK floats stay in L2
constexpr float FLOOR = -3.0e38f;     // stands for "no logit yet" and for masked vocabulary; finite, so x - FLOOR is too
constexpr float EXP_UNDERFLOW = -87.0f;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));

inline Vec splat(float x) { return Vec{} + x; }
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

inline Vec tanh_vec(Vec x) {
    const Vec magnitude = x < Vec{} ? -x : x;
    const Vec e = exp_nonpositive(magnitude * splat(-2.0f));
    const Vec t = (splat(1.0f) - e) / (splat(1.0f) + e);
    return x < Vec{} ? -t : t;
}

// -- operands ---------------------------------------------------------------------------------------------------------

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

// hidden[first : first + count] -> packed[block][k][BLOCK], zero beyond the last token.
template <class T>
void pack_hidden(const T* hidden, int64_t width, int64_t first, int64_t count, int64_t n_blocks, float* packed) {
    for (int64_t block = 0; block < n_blocks; ++block) {
        float* target = packed + block * width * BLOCK;
        for (int64_t k0 = 0; k0 < width; k0 += 16) {  // 16 columns at a time keep the written lines in L1
            const int64_t k1 = k0 + 16 < width ? k0 + 16 : width;
            for (int lane = 0; lane < BLOCK; ++lane) {
                const int64_t row = block * BLOCK + lane;
                const T* source = hidden + (first + row) * width;
                for (int64_t k = k0; k < k1; ++k) target[k * BLOCK + lane] = row < count ? to_float(source + k) : 0.0f;
            }
        }
    }
}

// ROWS rows of the lm_head as fp32: the rows themselves where that is what they are, else a converted copy.
template <class T>
const float* weight_rows(const T* weight, int64_t width, int64_t first, int64_t count, float* scratch) {
    const T* source = weight + first * width;
    if (sizeof(T) == 4 && count == ROWS) return reinterpret_cast<const float*>(source);
    for (int64_t i = 0; i < count * width; ++i) scratch[i] = to_float(source + i);
    std::memset(scratch + count * width, 0, static_cast<size_t>((ROWS - count) * width) * 4);
    return scratch;
}

// tile[ROWS][BLOCK] (+)= weight rows . packed hidden states over `depth` columns.
template <bool ACCUMULATE>
__attribute__((noinline)) void multiply(const float* __restrict packed, const float* __restrict weight,
                                        int64_t weight_stride, int64_t depth, float* __restrict tile) {
    Vec sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i) {
        sum[i][0] = ACCUMULATE ? load(tile + i * BLOCK) : Vec{};
        sum[i][1] = ACCUMULATE ? load(tile + i * BLOCK + LANES) : Vec{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        const Vec left = load(packed + k * BLOCK), right = load(packed + k * BLOCK + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Vec w = splat(weight[i * weight_stride + k]);
            sum[i][0] += left * w;
            sum[i][1] += right * w;
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        store(tile + i * BLOCK, sum[i][0]);
        store(tile + i * BLOCK + LANES, sum[i][1]);
    }
}

// -- statistics -------------------------------------------------------------------------------------------------------

// Running statistics of the off-target logits, one lane per token: largest logit m, then with x = z - m and e = exp(x)
// the sums of e, e x, e^2 and (e f)^2, f = dz/draw; and the target's own logit.
enum Stat { MAX, SUM, SUM_X, SUM_SQ, SUM_SLOPE_SQ, TARGET, N_STATS };

struct Logits {  // how raw products become z, and z its slope
    explicit Logits(const HeadPass& a)
        : scale(a.softcap > 0 ? a.softcap * a.inverse_temperature : a.inverse_temperature),
          inverse_cap(a.softcap > 0 ? 1.0f / a.softcap : 0.0f), inverse_temperature(a.inverse_temperature) {}
    template <bool CAPPED> Vec z(Vec raw) const {
        const Vec value = CAPPED ? tanh_vec(raw * splat(inverse_cap)) : raw;
        return maximum(splat(FLOOR), value * splat(scale));
    }
    template <bool CAPPED> Vec slope(Vec z) const {
        if (!CAPPED) return splat(inverse_temperature);
        const Vec tanh_value = z / splat(scale);
        return (splat(1.0f) - tanh_value * tanh_value) * splat(inverse_temperature);
    }
    double slope(double z) const {
        if (inverse_cap == 0.0f) return inverse_temperature;
        const double tanh_value = z / scale;
        return (1.0 - tanh_value * tanh_value) * inverse_temperature;
    }
    float scale, inverse_cap, inverse_temperature;
};

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
    const double target_x = target - reference, target_e = std::exp(target_x), total = sum + target_e;
    const double log_total = target_e == 1.0 ? std::log1p(sum) : std::log(total);
    const double p_target = target_e / total, off_mass = sum / total;
    const double slope = logits.slope(target), off_slope_sq = a.softcap > 0 ? sum_slope_sq : sum_sq * slope * slope;
    const bool impossible = target <= FLOOR;
    a.logp[token] = static_cast<float>(impossible ? -HUGE_VAL : target_x - log_total);
    a.lse[token] = static_cast<float>(reference + log_total);
    const double mean_x = (sum_x + (impossible ? 0.0 : target_x * target_e)) / total, entropy = log_total - mean_x;
    a.entropy[token] = static_cast<float>(entropy > 0 ? entropy : (entropy <= 0 ? 0.0 : entropy));
    a.sum_p_sq[token] = static_cast<float>(sum_sq / (total * total) + p_target * p_target);
    a.score_sq[token] = static_cast<float>(slope * slope * off_mass * off_mass + off_slope_sq / (total * total));
    a.off_mass[token] = static_cast<float>(off_mass);
}

// -- threads ----------------------------------------------------------------------------------------------------------

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t generation = generation_;
        if (++arrived_ == count_) {
            arrived_ = 0;
            ++generation_;
            condition_.notify_all();
        } else {
            condition_.wait(lock, [&] { return generation != generation_; });
        }
    }

  private:
    const int count_;
    int arrived_ = 0;
    int64_t generation_ = 0;
    std::mutex mutex_;
    std::condition_variable condition_;
};

template <class Body>
void run_threads(int n_threads, Body body) {
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) threads.emplace_back(body, i);
    body(0);
    for (auto& thread : threads) thread.join();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t clamp_multiple(int64_t value, int64_t low, int64_t high, int64_t unit) {
    value = value / unit * unit;
    return value < low ? low : value > high ? high : value;
}

// -- the pass ---------------------------------------------------------------------------------------------------------

// Products and statistics of one token chunk against one split of the vocabulary.
// stats: [n_blocks][N_STATS][BLOCK]; kept: null or the chunk's z, [vocabulary][kept_stride].
template <class T, bool CAPPED>
void visit(const HeadPass& a, const Logits& logits, const float* packed, int64_t n_blocks, const int32_t* targets,
           int64_t first_row, int64_t last_row, float* tiles, float* scratch, float* stats, float* kept,
           int64_t kept_stride) {
    for (int64_t block = 0; block < n_blocks; ++block)
        for (int s = 0; s < N_STATS; ++s)
            for (int lane = 0; lane < BLOCK; ++lane)
                stats[(block * N_STATS + s) * BLOCK + lane] = s == MAX || s == TARGET ? FLOOR : 0.0f;
    for (int64_t row = first_row; row < last_row; row += ROWS) {
        const int rows = static_cast<int>(last_row - row < ROWS ? last_row - row : ROWS);
        const float* weight = weight_rows(static_cast<const T*>(a.weight), a.width, row, rows, scratch);
        for (int64_t k = 0; k < a.width; k += K_BLOCK) {
            const int64_t depth = a.width - k < K_BLOCK ? a.width - k : K_BLOCK;
            for (int64_t block = 0; block < n_blocks; ++block) {
                auto product = k ? multiply<true> : multiply<false>;
                product(packed + (block * a.width + k) * BLOCK, weight + k, a.width, depth, tiles + block * ROWS * BLOCK);
            }
        }
        for (int64_t block = 0; block < n_blocks; ++block)
            reduce<CAPPED>(logits, tiles + block * ROWS * BLOCK, a.bias ? a.bias + row : nullptr, rows,
                           static_cast<int32_t>(row), targets + block * BLOCK, stats + block * N_STATS * BLOCK,
                           kept ? kept + row * kept_stride + block * BLOCK : nullptr, kept_stride);
    }
}

// Vocabulary rows per split: its part of the lm_head stays in the last-level cache while all tokens pass over it.
// It does not depend on the number of threads, so neither does a single bit of the result.
int64_t split_rows(const HeadPass& a) {
    return clamp_multiple((8 << 20) / (4 * a.width), 1024 / ROWS * ROWS, 8192 / ROWS * ROWS, ROWS);
}

// Tokens per chunk: their packed hidden states stay in L2.
int64_t chunk_tokens(const HeadPass& a, int64_t most) {
    return clamp_multiple((640 << 10) / (4 * a.width), 2 * CHUNK_UNIT, most, CHUNK_UNIT);
}

std::vector<int32_t> chunk_targets(const HeadPass& a, int64_t first, int64_t count, int64_t lanes) {
    std::vector<int32_t> targets(lanes, -1);
    for (int64_t i = 0; i < count; ++i) targets[i] = static_cast<int32_t>(a.tokens[first + i]);
    return targets;
}

template <class T, bool CAPPED>
void statistics_only(const HeadPass& a) {
    const Logits logits(a);
    const int64_t chunk = chunk_tokens(a, 256), n_chunks = ceil_div(a.n_tokens, chunk), n_blocks = chunk / BLOCK;
    const int64_t split = split_rows(a), n_splits = ceil_div(a.vocabulary, split);
    const int64_t per_chunk = n_blocks * N_STATS * BLOCK, per_split = n_chunks * per_chunk;
    Aligned partials(n_splits * per_split);
    std::atomic<int64_t> next{0};
    run_threads(a.n_threads, [&](int) {
        Aligned packed(chunk * a.width), tiles(n_blocks * ROWS * BLOCK), scratch(ROWS * a.width);
        // Splits outermost: every thread works on the same part of the lm_head.
        for (int64_t item; (item = next.fetch_add(1)) < n_splits * n_chunks;) {
            const int64_t s = item / n_chunks, c = item % n_chunks, first = c * chunk;
            const int64_t count = a.n_tokens - first < chunk ? a.n_tokens - first : chunk;
            const int64_t used = ceil_div(count, BLOCK), last = (s + 1) * split;
            pack_hidden(static_cast<const T*>(a.hidden), a.width, first, count, used, packed.data);
            const auto targets = chunk_targets(a, first, count, chunk);
            visit<T, CAPPED>(a, logits, packed.data, used, targets.data(), s * split,
                             last < a.vocabulary ? last : a.vocabulary, tiles.data, scratch.data,
                             partials.data + s * per_split + c * per_chunk, nullptr, 0);
        }
    });
    for (int64_t t = 0; t < a.n_tokens; ++t) {
        const int64_t c = t / chunk, block = t % chunk / BLOCK, lane = t % BLOCK;
        finish_token(a, logits, partials.data + c * per_chunk + block * N_STATS * BLOCK + lane, n_splits, per_split, BLOCK, t);
    }
}

// Score sums of one range of the vocabulary over the chunk's tokens, from their kept off-target logits.
template <bool CAPPED>
void sweep(const HeadPass& a, const Logits& logits, const float* kept, int64_t chunk, int64_t first, int64_t count,
           int64_t first_response, int64_t last_response, int64_t first_row, int64_t last_row, const float* lse,
           float* row_scores) {
    const int64_t n_vectors = ceil_div(count, LANES);
    for (int64_t v = first_row; v < last_row; ++v) {
        const float* z = kept + v * chunk;
        for (int64_t j = 0; j < n_vectors; ++j) {
            const Vec value = load(z + j * LANES), p = exp_nonpositive(value - load(lse + j * LANES));
            store(row_scores + j * LANES, p > Vec{} ? p * logits.slope<CAPPED>(value) : Vec{});
        }
        for (int64_t r = first_response; r < last_response; ++r) {
            int64_t t = a.cu_seqlens[r] > first ? a.cu_seqlens[r] : first;
            const int64_t stop = a.cu_seqlens[r + 1] < first + count ? a.cu_seqlens[r + 1] : first + count;
            Vec partial{};
            for (; t + LANES <= stop; t += LANES) partial += load(row_scores + (t - first)) * load(a.coefficients + t);
            float sum = 0;
            for (int lane = 0; lane < LANES; ++lane) sum += partial[lane];
            for (; t < stop; ++t) sum += row_scores[t - first] * a.coefficients[t];
            a.sums[r * a.vocabulary + v] -= sum;
        }
    }
}

template <class T, bool CAPPED>
void statistics_and_sums(const HeadPass& a) {
    const Logits logits(a);
    const int64_t chunk = chunk_tokens(a, 128), n_chunks = ceil_div(a.n_tokens, chunk), n_blocks = chunk / BLOCK;
    const int64_t split = 1024 / ROWS * ROWS, n_splits = ceil_div(a.vocabulary, split);
    const int64_t per_split = n_blocks * N_STATS * BLOCK;
    Aligned kept(a.vocabulary * chunk), packed(chunk * a.width), partials(n_splits * per_split), lse(chunk);
    std::vector<int32_t> targets;
    std::vector<std::atomic<int64_t>> next(2 * n_chunks);  // work counters: one per chunk and phase
    Barrier barrier(a.n_threads);
    std::memset(a.sums, 0, static_cast<size_t>(a.n_responses * a.vocabulary) * 4);
    int64_t first_response = 0, last_response = 0;
    run_threads(a.n_threads, [&](int thread) {
        Aligned tiles(n_blocks * ROWS * BLOCK), scratch(ROWS * a.width), row_scores(chunk + LANES);
        for (int64_t c = 0; c < n_chunks; ++c) {
            const int64_t first = c * chunk, count = a.n_tokens - first < chunk ? a.n_tokens - first : chunk;
            const int64_t used = ceil_div(count, BLOCK);
            if (thread == 0) {
                pack_hidden(static_cast<const T*>(a.hidden), a.width, first, count, used, packed.data);
                targets = chunk_targets(a, first, count, chunk);
                while (a.cu_seqlens[first_response + 1] <= first) ++first_response;
                last_response = first_response;
                while (last_response < a.n_responses && a.cu_seqlens[last_response] < first + count) ++last_response;
            }
            barrier.wait();
            for (int64_t s; (s = next[2 * c].fetch_add(1)) < n_splits;) {
                const int64_t last = (s + 1) * split < a.vocabulary ? (s + 1) * split : a.vocabulary;
                visit<T, CAPPED>(a, logits, packed.data, used, targets.data(), s * split, last, tiles.data,
                                 scratch.data, partials.data + s * per_split, kept.data, chunk);
            }
            barrier.wait();
            if (thread == 0) {
                for (int64_t i = 0; i < chunk; ++i) lse.data[i] = 0.0f;
                for (int64_t i = 0; i < count; ++i) {
                    finish_token(a, logits, partials.data + i / BLOCK * N_STATS * BLOCK + i % BLOCK, n_splits, per_split,
                                 BLOCK, first + i);
                    lse.data[i] = a.lse[first + i];
                }
            }
            barrier.wait();
            for (int64_t s; (s = next[2 * c + 1].fetch_add(1)) < n_splits;) {
                const int64_t last = (s + 1) * split < a.vocabulary ? (s + 1) * split : a.vocabulary;
                sweep<CAPPED>(a, logits, kept.data, chunk, first, count, first_response, last_response, s * split, last,
                              lse.data, row_scores.data);
            }
            barrier.wait();
        }
    });
    for (int64_t r = 0; r < a.n_responses; ++r)  // the targets, held out above
        for (int64_t t = a.cu_seqlens[r]; t < a.cu_seqlens[r + 1]; ++t)
            a.sums[r * a.vocabulary + a.tokens[t]] +=
                a.coefficients[t] * a.off_mass[t] * static_cast<float>(logits.slope(static_cast<double>(a.lse[t]) + a.logp[t]));
}

template <class T>
void head_pass_typed(const HeadPass& a) {
    if (a.sums) a.softcap > 0 ? statistics_and_sums<T, true>(a) : statistics_and_sums<T, false>(a);
    else a.softcap > 0 ? statistics_only<T, true>(a) : statistics_only<T, false>(a);
}

void head_pass(const HeadPass& a) {
    switch (a.dtype) {
        case DType::float32: return head_pass_typed<float>(a);
        case DType::bfloat16: return head_pass_typed<BFloat16>(a);
        case DType::float16: return head_pass_typed<Float16>(a);
    }
}

}  // namespace
