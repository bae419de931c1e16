// Gradients of log-probs and entropies: the logits' product again, and two more with their derivatives.
//
// Included once per instruction set, as head_pass_kernel.h. A thread takes a part of the vocabulary and goes through
// the tokens chunk by chunk: a tile of logits leaves the registers into L1, becomes d = dL/draw there and is kept in L2
// as d[entry][token]. Its rows are then the scalars of dW += d . hidden, its columns those of dH = d^T . W: three
// products with one register tile. The [N, V] matrix exists nowhere.
//
// Per logit 6 D flops in the tile (4 D where one gradient is not wanted) and about 25 for d, one exp. Bytes: a part of
// 768 entries and a chunk of 192 tokens read W twice, dW, dH and hidden once or twice, in all 0.1 D a logit: 60 flops a
// byte, so it is bound by the FMA units. In units of torch.mm(hidden, W^T), one core of an EPYC (Zen 5) under load,
// N = 2048, V = 49152, D = 576: the tile alone takes 0.38 a product, 1.15 in all; measured 1.34, the head pass before
// it 0.44. At N = 512, V = 151936, D = 896, where a new dW is written for every 512 tokens, 1.4 to 1.7.
//
// Rejected, in the same units: torch's tiles with MKL's products 3.2, with oneDNN's (a private operator) 1.65; parts of
// 192 entries, which repack hidden and add to dH four times as often, + 0.1; dW packed like W and copied at the end
// + 0.1; huge pages under a new dW: fewer faults, but on a virtual machine dearer to clear (1.75 for 1.45 at N = 512);
// dH per thread, N D floats each.
//
// Numerics: fp32 sums over at most 192 terms, added up in the order of chunks (dW) and of parts (dH): threads take
// turns. What a part does depends on the shape alone, so no bit depends on their number.
#pragma once

#include "head_gradient.h"
#include "logits.h"
#include "product.h"
#include "threads.h"

namespace head_gradient {
namespace {

constexpr int64_t TOKENS = 192, ENTRIES = 192;  // of a block of d: multiples of ROWS and BLOCK everywhere
constexpr int64_t STRIDE = TOKENS + 16;         // between entries of d: a power of two would use few sets of L1
constexpr float NEGLIGIBLE = 1e-30f;  // probabilities below count as 0: subnormal operands slow products down ten times

// rows[count][width] -> strips[width / BLOCK][height][BLOCK], zero beyond the last column.
template <class T>
void pack_strips(const T* rows, int64_t width, int64_t count, int64_t height, float* strips) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < width; k += BLOCK) {
            const T* source = rows + i * width + k;
            float* target = strips + k * height + i * BLOCK;
            if (width - k >= BLOCK)
                for (int j = 0; j < BLOCK; ++j) target[j] = to_float(source + j);
            else
                for (int j = 0; j < BLOCK; ++j) target[j] = k + j < width ? to_float(source + j) : 0.0f;
        }
}

// target[rows][columns] (+)= the tile's first rows and columns; target's rows are `stride` apart.
inline void put(const float* tile, int64_t rows, int64_t columns, bool add, float* target, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, tile += BLOCK, target += stride)
        if (columns == BLOCK) {
            store(target, add ? load(target) + load(tile) : load(tile));
            store(target + LANES, add ? load(target + LANES) + load(tile + LANES) : load(tile + LANES));
        } else {
            for (int64_t j = 0; j < columns; ++j) target[j] = add ? target[j] + tile[j] : tile[j];
        }
}

struct Sizes {  // a split of the vocabulary is a thread's part
    explicit Sizes(const rlvr::HeadGradient& a)
        : strips(ceil_div(a.width, BLOCK)), chunks(ceil_div(a.n_tokens, TOKENS)),
          split(clamp_multiple(a.vocabulary / 48, ENTRIES, 4 * ENTRIES, ENTRIES)),
          splits(ceil_div(a.vocabulary, split)) {}
    int64_t strips, chunks, split, splits;
};

// What a thread writes while it works; made before the threads start.
struct Workspace {
    Workspace(const rlvr::HeadGradient& a, const Sizes& sizes)
        : packed(TOKENS * a.width), hidden(a.grad_weight ? sizes.strips * TOKENS * BLOCK : 0),
          weight(a.grad_hidden ? sizes.strips * sizes.split * BLOCK : 0),
          grad_hidden(a.grad_hidden ? TOKENS * a.width : 0), derivatives(ENTRIES * STRIDE), tiles(ROWS * TOKENS),
          scratch(ROWS * a.width), columns(5 * TOKENS), targets(TOKENS), bias(sizes.split) {
        std::memset(derivatives.data, 0, ENTRIES * STRIDE * 4);
    }
    Aligned packed, hidden, weight, grad_hidden, derivatives, tiles, scratch, columns;
    std::vector<int32_t> targets;
    std::vector<double> bias;
};

enum Column { LSE, ENTROPY, OFF_MASS, GRAD_LOGP, GRAD_ENTROPY };  // of a chunk's tokens, TOKENS floats each

// A chunk's tokens into the workspace. Of lanes beyond them no result is used.
template <class T>
void load_chunk(const rlvr::HeadGradient& a, int64_t first, int64_t count, Workspace& own) {
    const T* const hidden = static_cast<const T*>(a.hidden);
    pack_hidden(hidden, a.width, first, count, ceil_div(count, BLOCK), own.packed.data);
    if (a.grad_weight) pack_strips(hidden + first * a.width, a.width, count, TOKENS, own.hidden.data);
    const float* const sources[] = {a.lse, a.entropy, a.off_mass, a.grad_logp, a.grad_entropy};
    for (int column = 0; column < 5; ++column)
        for (int64_t t = 0; t < TOKENS; ++t)
            own.columns.data[column * TOKENS + t] = t < count ? sources[column][first + t] : 0.0f;
    for (int64_t t = 0; t < TOKENS; ++t) own.targets[t] = t < count ? static_cast<int32_t>(a.tokens[first + t]) : -1;
}

// d[entry][token] of `rows` entries and one block of tokens from their raw products. With p the softmax, y the target:
// dL/dz_v = grad_logp ([v = y] (1 - p_y) - [v != y] p_v) - grad_entropy p_v (log p_v + H), where 1 - p_y is the
// off-target mass of the pass, which keeps its digits when p_y is nearly 1.
template <bool CAPPED>
void derive(const Logits& logits, const float* tile, const float* bias, int rows, int32_t first_row,
            const int32_t* targets, const float* columns, float* d) {
    for (int half = 0; half < BLOCK; half += LANES) {
        IVec target;
        std::memcpy(&target, targets + half, sizeof target);
        const float* const own = columns + half;
        const Vec lse = load(own + LSE * TOKENS), entropy = load(own + ENTROPY * TOKENS);
        const Vec off_mass = load(own + OFF_MASS * TOKENS), grad_logp = load(own + GRAD_LOGP * TOKENS);
        const Vec grad_entropy = load(own + GRAD_ENTROPY * TOKENS);
        for (int i = 0; i < rows; ++i) {
            Vec raw = load(tile + i * BLOCK + half);
            if (bias) raw += splat(bias[i]);
            const Vec z = logits.z<CAPPED>(raw), log_p = z - lse;
            Vec p = exp_nonpositive(log_p);
            p = p < splat(NEGLIGIBLE) ? Vec{} : p;
            const IVec is_target = target == (first_row + i);
            const Vec score = is_target ? off_mass : -p;
            const Vec spread = p * (log_p + entropy);
            store(d + i * STRIDE + half, (score * grad_logp - spread * grad_entropy) * logits.slope<CAPPED>(z));
        }
    }
}

// d of entries [first_row, first_row + rows) and the chunk's tokens.
template <class T, bool CAPPED>
void derivatives(const rlvr::HeadGradient& a, const Logits& logits, int64_t first_row, int64_t rows, int64_t count,
                 Workspace& own) {
    const int64_t n_blocks = ceil_div(count, BLOCK);
    for (int64_t i = 0; i < rows; i += ROWS) {
        const int left = static_cast<int>(rows - i < ROWS ? rows - i : ROWS);
        const int64_t row = first_row + i;
        const float* weight = weight_rows(static_cast<const T*>(a.weight), a.width, row, left, own.scratch.data);
        multiply_tokens(own.packed.data, weight, a.width, n_blocks, own.tiles.data);
        for (int64_t block = 0; block < n_blocks; ++block)
            derive<CAPPED>(logits, own.tiles.data + block * TILE, a.bias ? a.bias + row : nullptr, left,
                           static_cast<int32_t>(row), own.targets.data() + block * BLOCK,
                           own.columns.data + block * BLOCK, own.derivatives.data + i * STRIDE + block * BLOCK);
    }
}

inline float sum(const float* x, int64_t count) {
    Vec lanes{};
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) lanes += load(x + t);
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
    for (; t < count; ++t) total += x[t];
    return total;
}

struct Rows {  // of d are entries,
    static const float* at(const float* d, int64_t i) { return d + i * STRIDE; }
    static constexpr auto multiply = multiply_rows<false>;
};

struct Columns {  // and its columns tokens
    static const float* at(const float* d, int64_t i) { return d + i; }
    static constexpr auto multiply = multiply_columns<false>;
};

// target[count][width] (+)= `count` rows or columns of d, `depth` long, times the strips of a matrix.
template <class Side>
void multiply_block(const float* strips, int64_t height, const float* d, int64_t count, int64_t depth, int64_t width,
                    bool add, float* tile, float* target) {
    for (int64_t k = 0; k < width; k += BLOCK) {
        const int64_t columns = width - k < BLOCK ? width - k : BLOCK;
        for (int64_t i = 0; i < count; i += ROWS) {
            const int64_t rows = count - i < ROWS ? count - i : ROWS;
            for (int64_t row = 0; row < rows; ++row) {  // what the tile will be added to
                __builtin_prefetch(target + (i + row) * width + k, 1);
                __builtin_prefetch(target + (i + row) * width + k + LANES, 1);
            }
            Side::multiply(strips + k * height, Side::at(d, i), STRIDE, depth, tile);
            put(tile, rows, columns, add, target + i * width + k, width);
        }
    }
}

// Entries [first_row, first_row + rows) against all tokens, as the split'th of the splits.
template <class T, bool CAPPED>
void run_split(const rlvr::HeadGradient& a, const Logits& logits, const Sizes& sizes, int64_t split, Turns& turns,
               Workspace& own) {
    const int64_t first_row = split * sizes.split, height = sizes.split;
    const int64_t rows = a.vocabulary - first_row < height ? a.vocabulary - first_row : height;
    const float* const d = own.derivatives.data;
    if (a.grad_hidden)
        pack_strips(static_cast<const T*>(a.weight) + first_row * a.width, a.width, rows, height, own.weight.data);
    std::fill(own.bias.begin(), own.bias.end(), 0.0);
    for (int64_t chunk = 0; chunk < sizes.chunks; ++chunk) {
        const int64_t first = chunk * TOKENS, count = a.n_tokens - first < TOKENS ? a.n_tokens - first : TOKENS;
        load_chunk<T>(a, first, count, own);
        for (int64_t entry = 0; entry < rows; entry += ENTRIES) {
            const int64_t entries = rows - entry < ENTRIES ? rows - entry : ENTRIES;
            derivatives<T, CAPPED>(a, logits, first_row + entry, entries, count, own);
            if (a.grad_bias)
                for (int64_t i = 0; i < entries; ++i) own.bias[entry + i] += sum(d + i * STRIDE, count);
            if (a.grad_weight)
                multiply_block<Rows>(own.hidden.data, TOKENS, d, entries, count, a.width, chunk > 0, own.tiles.data,
                                     a.grad_weight + (first_row + entry) * a.width);
            if (a.grad_hidden)
                multiply_block<Columns>(own.weight.data + entry * BLOCK, height, d, count, entries, a.width, entry > 0,
                                        own.tiles.data, own.grad_hidden.data);
        }
        if (!a.grad_hidden) continue;
        float* const target = a.grad_hidden + first * a.width;
        turns.wait(chunk, split);
        for (int64_t i = 0; i < count * a.width; ++i)
            target[i] = split ? target[i] + own.grad_hidden.data[i] : own.grad_hidden.data[i];
        turns.finish(chunk);
    }
    if (a.grad_bias)
        for (int64_t i = 0; i < rows; ++i) a.grad_bias[first_row + i] = static_cast<float>(own.bias[i]);
}

template <class T, bool CAPPED>
void run_typed(const rlvr::HeadGradient& a) {
    const Logits logits(a.inverse_temperature, a.softcap);
    const Sizes sizes(a);
    const int most = static_cast<int>(sizes.splits < a.n_threads ? sizes.splits : a.n_threads);
    const int n_threads = useful_threads(most, 6.0 * a.n_tokens * a.vocabulary * a.width);
    std::vector<std::unique_ptr<Workspace>> workspaces;
    for (int i = 0; i < n_threads; ++i) workspaces.push_back(std::make_unique<Workspace>(a, sizes));
    std::atomic<int64_t> next{0};
    Turns turns(sizes.chunks);
    run_threads(n_threads, [&](int thread) {
        for (int64_t split; (split = next.fetch_add(1)) < sizes.splits;)
            run_split<T, CAPPED>(a, logits, sizes, split, turns, *workspaces[thread]);
    });
}

template <class T>
void run_capped(const rlvr::HeadGradient& a) {
    a.softcap > 0 ? run_typed<T, true>(a) : run_typed<T, false>(a);
}

void run(const rlvr::HeadGradient& a) {
    if (a.n_tokens == 0) {
        if (a.grad_weight) std::memset(a.grad_weight, 0, static_cast<size_t>(a.vocabulary * a.width) * 4);
        if (a.grad_bias) std::memset(a.grad_bias, 0, static_cast<size_t>(a.vocabulary) * 4);
        return;
    }
    switch (a.dtype) {
        case rlvr::DType::float32: return run_capped<float>(a);
        case rlvr::DType::bfloat16: return run_capped<BFloat16>(a);
        case rlvr::DType::float16: return run_capped<Float16>(a);
    }
}

}  // namespace
}  // namespace head_gradient
