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

#include "product.h"
#include "statistics.h"
#include "threads.h"

namespace {

using rlvr::DType;
using rlvr::HeadPass;

constexpr int64_t CHUNK_UNIT = 32;  // token chunks are multiples of it on every instruction set

// What a thread writes while it works. Made before the threads start, so that no allocation can fail inside one.
struct Workspace {
    Workspace(const HeadPass& a, int64_t chunk)
        : packed(chunk * a.width), tiles(chunk * ROWS), scratch(ROWS * a.width), row_scores(chunk + LANES),
          targets(chunk) {}
    Aligned packed, tiles, scratch, row_scores;
    std::vector<int32_t> targets;
};

std::vector<std::unique_ptr<Workspace>> workspaces(const HeadPass& a, int64_t chunk) {
    std::vector<std::unique_ptr<Workspace>> all;
    for (int i = 0; i < a.n_threads; ++i) all.push_back(std::make_unique<Workspace>(a, chunk));
    return all;
}

// Pack tokens [first, first + count) into the workspace; lanes beyond them match no target.
template <class T>
void load_chunk(const HeadPass& a, int64_t first, int64_t count, Workspace& work) {
    pack_hidden(static_cast<const T*>(a.hidden), a.width, first, count, ceil_div(count, BLOCK), work.packed.data);
    for (size_t i = 0; i < work.targets.size(); ++i)
        work.targets[i] = static_cast<int64_t>(i) < count ? static_cast<int32_t>(a.tokens[first + i]) : -1;
}

// Products and statistics of one token chunk against one split of the vocabulary.
// chunk holds its tokens, own is this thread's scratch; stats: [n_blocks][N_STATS][BLOCK]; kept: null or the chunk's z,
// [vocabulary][kept_stride].
template <class T, bool CAPPED>
void visit(const HeadPass& a, const Logits& logits, const Workspace& chunk, Workspace& own, int64_t n_blocks,
           int64_t first_row, int64_t last_row, float* stats, float* kept, int64_t kept_stride) {
    float* const tiles = own.tiles.data;
    for (int64_t block = 0; block < n_blocks; ++block)
        for (int s = 0; s < N_STATS; ++s)
            for (int lane = 0; lane < BLOCK; ++lane)
                stats[(block * N_STATS + s) * BLOCK + lane] = s == MAX || s == TARGET ? FLOOR : 0.0f;
    for (int64_t row = first_row; row < last_row; row += ROWS) {
        const int rows = static_cast<int>(last_row - row < ROWS ? last_row - row : ROWS);
        const float* weight = weight_rows(static_cast<const T*>(a.weight), a.width, row, rows, own.scratch.data);
        multiply_tokens(chunk.packed.data, weight, a.width, n_blocks, tiles);
        for (int64_t block = 0; block < n_blocks; ++block)
            reduce<CAPPED>(logits, tiles + block * TILE, a.bias ? a.bias + row : nullptr, rows,
                           static_cast<int32_t>(row), chunk.targets.data() + block * BLOCK, stats + block * N_STATS * BLOCK,
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

template <class T, bool CAPPED>
void statistics_only(const HeadPass& a) {
    const Logits logits(a.inverse_temperature, a.softcap);
    const int64_t chunk = chunk_tokens(a, 256), n_chunks = ceil_div(a.n_tokens, chunk), n_blocks = chunk / BLOCK;
    const int64_t split = split_rows(a), n_splits = ceil_div(a.vocabulary, split);
    const int64_t per_chunk = n_blocks * N_STATS * BLOCK, per_split = n_chunks * per_chunk;
    Aligned partials(n_splits * per_split);
    const auto work = workspaces(a, chunk);
    std::atomic<int64_t> next{0};
    run_threads(a.n_threads, [&](int thread) {
        Workspace& own = *work[thread];
        // Splits outermost: every thread works on the same part of the lm_head.
        for (int64_t item; (item = next.fetch_add(1)) < n_splits * n_chunks;) {
            const int64_t s = item / n_chunks, c = item % n_chunks, first = c * chunk;
            const int64_t count = a.n_tokens - first < chunk ? a.n_tokens - first : chunk;
            const int64_t last = (s + 1) * split < a.vocabulary ? (s + 1) * split : a.vocabulary;
            load_chunk<T>(a, first, count, own);
            visit<T, CAPPED>(a, logits, own, own, ceil_div(count, BLOCK), s * split, last,
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
    const Logits logits(a.inverse_temperature, a.softcap);
    const int64_t chunk = chunk_tokens(a, 128), n_chunks = ceil_div(a.n_tokens, chunk), n_blocks = chunk / BLOCK;
    const int64_t split = 1024 / ROWS * ROWS, n_splits = ceil_div(a.vocabulary, split);
    const int64_t per_split = n_blocks * N_STATS * BLOCK;
    Aligned kept(a.vocabulary * chunk), partials(n_splits * per_split), lse(chunk);
    const auto work = workspaces(a, chunk);
    Workspace& shared = *work[0];  // holds the chunk's tokens
    std::vector<std::atomic<int64_t>> next(2 * n_chunks);  // work counters: one per chunk and phase
    Barrier barrier(a.n_threads);
    std::memset(a.sums, 0, static_cast<size_t>(a.n_responses * a.vocabulary) * 4);
    int64_t first_response = 0, last_response = 0;
    bool merging = a.merge != nullptr;
    run_threads(a.n_threads, [&](int thread) {
        Workspace& own = *work[thread];
        for (int64_t c = 0; c < n_chunks; ++c) {
            const int64_t first = c * chunk, count = a.n_tokens - first < chunk ? a.n_tokens - first : chunk;
            if (thread == 0) {
                load_chunk<T>(a, first, count, shared);
                while (a.cu_seqlens[first_response + 1] <= first) ++first_response;
                last_response = first_response;
                while (last_response < a.n_responses && a.cu_seqlens[last_response] < first + count) ++last_response;
            }
            barrier.wait();
            for (int64_t s; (s = next[2 * c].fetch_add(1)) < n_splits;) {
                const int64_t last = (s + 1) * split < a.vocabulary ? (s + 1) * split : a.vocabulary;
                visit<T, CAPPED>(a, logits, shared, own, ceil_div(count, BLOCK), s * split, last,
                                 partials.data + s * per_split, kept.data, chunk);
            }
            barrier.wait();
            if (thread == 0) {
                for (int64_t i = 0; i < count; ++i)
                    finish_token(a, logits, partials.data + i / BLOCK * N_STATS * BLOCK + i % BLOCK, n_splits, per_split,
                                 BLOCK, first + i);
                if (merging) merging = a.merge(a.merge_context, first, count);
                for (int64_t i = 0; i < chunk; ++i) lse.data[i] = i < count ? a.lse[first + i] : 0.0f;
            }
            barrier.wait();
            for (int64_t s; (s = next[2 * c + 1].fetch_add(1)) < n_splits;) {
                const int64_t last = (s + 1) * split < a.vocabulary ? (s + 1) * split : a.vocabulary;
                sweep<CAPPED>(a, logits, kept.data, chunk, first, count, first_response, last_response, s * split, last,
                              lse.data, own.row_scores.data);
            }
            barrier.wait();
        }
    });
    for (int64_t r = 0; r < a.n_responses; ++r)  // the targets, held out above
        for (int64_t t = a.cu_seqlens[r]; t < a.cu_seqlens[r + 1]; ++t)
            if (a.tokens[t] >= 0)
                a.sums[r * a.vocabulary + a.tokens[t]] +=
                    a.coefficients[t] * a.off_mass[t] * static_cast<float>(logits.slope(static_cast<double>(a.lse[t]) + a.logp[t]));
}

template <class T>
void head_pass_typed(const HeadPass& a) {
    if (a.sums) a.softcap > 0 ? statistics_and_sums<T, true>(a) : statistics_and_sums<T, false>(a);
    else a.softcap > 0 ? statistics_only<T, true>(a) : statistics_only<T, false>(a);
}

void head_pass(HeadPass a) {
    a.n_threads = useful_threads(a.n_threads, 2.0 * a.n_tokens * a.vocabulary * a.width);
    switch (a.dtype) {
        case DType::float32: return head_pass_typed<float>(a);
        case DType::bfloat16: return head_pass_typed<BFloat16>(a);
        case DType::float16: return head_pass_typed<Float16>(a);
    }
}

}  // namespace
