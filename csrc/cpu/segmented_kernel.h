// Segmented weight gradient with a statistics epilogue.
//
// Included once per instruction set, as head_pass_kernel.h. A register tile is ROWS outputs x 2 vectors of inputs. Its
// program walks the tokens response by response and leaves each response's tile in a store of n ROWS BLOCK floats, which
// the inner products and the sum over responses then read from L1 (n = 8) or L2 (n = 64): nothing of size
// n d_out d_in exists anywhere.
//
// Per tile and token ROWS x 2 FMA, ROWS broadcasts and 2 loads. Inner products add n (n + 1) / 2 products of tiles to n T
// of them: a share of (n + 1) / (2 T) for T tokens a response, 3.5 % of the weight gradient at n = 8, T = 128.
// Bytes: inputs are packed once into strips of BLOCK columns, M d_in floats; outputs a block of rows at a time, so that
// the block stays in L2 while all strips pass over it.
//
// Numerics: a response's tile is a sum over at most K_BLOCK tokens in fp32 at a time; inner products are fp32 over
// the 2 ROWS terms of a lane, then double. What a thread does depends on the shape alone, so no bit depends on their
// number.
#pragma once

#include "elements.h"
#include "register_tile.h"
#include "segmented.h"
#include "threads.h"

namespace segmented {
namespace {

constexpr int PAIR = LANES == 16 ? 4 : 2;  // responses x 4 others whose products fit the registers
constexpr int64_t STRIPS = 16;             // columns of an item, in strips
constexpr int64_t AHEAD = 16;              // rows: far apart, so the processor does not fetch them by itself

typedef double Double __attribute__((vector_size(LANES * 8), aligned(LANES * 4)));

// products[i][j] += <left tile i, right tile j>, i < PAIR, j < 4, lane by lane; `stride` from row to row of products.
__attribute__((noinline)) void inner_products(const float* left, const float* right, Double* products, int64_t stride) {
    Vec sum[PAIR][4];
    for (auto& row : sum)
        for (auto& cell : row) cell = Vec{};
    for (int64_t k = 0; k < TILE; k += LANES) {
        Vec other[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) other[j] = load(right + j * TILE + k);
#pragma GCC unroll 4
        for (int i = 0; i < PAIR; ++i) {
            const Vec own = load(left + i * TILE + k);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[i][j] += own * other[j];
        }
    }
    for (int i = 0; i < PAIR; ++i)
        for (int j = 0; j < 4; ++j) products[i * stride + j] += __builtin_convertvector(sum[i][j], Double);
}

double total(const Double& x) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

struct Work {
    explicit Work(const rlvr::Segmented& arguments)
        : a(arguments), responses(ceil_div(a.n_responses, 4) * 4), first(a.n_responses + 1, 0) {
        for (int64_t i = 0; i < a.n_pieces; ++i) first[a.pieces[i].response + 1] += a.pieces[i].rows;
        for (int64_t i = 0; i < a.n_responses; ++i) first[i + 1] += first[i];
        tokens = first[a.n_responses];
        strips = ceil_div(a.d_in, BLOCK);
        rows = clamp_multiple((512 << 10) / (4 * (tokens + 1)), 4 * ROWS, 16 * ROWS, ROWS);  // of a block, in L2
        row_blocks = ceil_div(a.d_out, rows);
        strip_blocks = ceil_div(strips, STRIPS);
    }
    const rlvr::Segmented& a;
    const int64_t responses;     // rounded up to whole blocks of 4
    std::vector<int64_t> first;  // [n_responses + 1] a response's first token in the packed order
    int64_t tokens, strips, rows, row_blocks, strip_blocks;
};

// target[panel][token][width] of columns [column, column + count) of one side of all pieces, zero beyond them.
template <class T, int WIDTH>
void pack(const Work& work, const void* rlvr::Piece::*side, int64_t rlvr::Piece::*stride, int64_t column, int64_t count,
          float* target) {
    int64_t token = 0;
    for (int64_t i = 0; i < work.a.n_pieces; ++i) {
        const rlvr::Piece& piece = work.a.pieces[i];
        const T* source = static_cast<const T*>(piece.*side) + column;
        for (int64_t t = 0; t < piece.rows; ++t, ++token, source += piece.*stride) {
            const T* ahead = source + (t + AHEAD < piece.rows ? AHEAD : 0) * (piece.*stride);
            for (int64_t k = 0; k < count; k += 64 / sizeof(T)) __builtin_prefetch(ahead + k);
            for (int64_t k = 0; k < count; k += WIDTH) {
                float* own = target + k * work.tokens + token * WIDTH;
                if (count - k >= WIDTH)
                    for (int j = 0; j < WIDTH; ++j) own[j] = to_float(source + k + j);
                else
                    for (int j = 0; j < WIDTH; ++j) own[j] = k + j < count ? to_float(source + k + j) : 0.0f;
            }
        }
    }
}

// What a thread writes; made before the threads start.
struct Scratch {
    explicit Scratch(const Work& work)
        : b(work.rows * work.tokens), tiles(work.responses * TILE), direction(TILE),
          products(work.responses * work.responses * 2 * LANES), along(work.responses * 2 * LANES) {}
    Aligned b, tiles, direction, products, along;
};

// Inner products of the responses' tiles, and their sum into the gradient. Tile of `n_rows` x `n_columns` at (row, column).
void reduce(const Work& work, Scratch& own, int64_t row, int64_t column, int64_t n_rows, int64_t n_columns) {
    const rlvr::Segmented& a = work.a;
    float* const tiles = own.tiles.data;
    auto* products = reinterpret_cast<Double*>(own.products.data);
    for (int64_t i = 0; i < work.responses; i += PAIR)
        for (int64_t j = i / 4 * 4; j < work.responses; j += 4)
            inner_products(tiles + i * TILE, tiles + j * TILE, products + i * work.responses + j, work.responses);
    if (a.direction) {
        float* const direction = own.direction.data;
        std::memset(direction, 0, TILE * 4);
        for (int64_t i = 0; i < n_rows; ++i)
            std::memcpy(direction + i * BLOCK, a.direction + (row + i) * a.d_in + column,
                        static_cast<size_t>(n_columns) * 4);
        auto* along = reinterpret_cast<Double*>(own.along.data);
        for (int64_t r = 0; r < a.n_responses; ++r) {
            Vec sum{};
            for (int k = 0; k < TILE; k += LANES) sum += load(direction + k) * load(tiles + r * TILE + k);
            along[r] += __builtin_convertvector(sum, Double);
        }
    }
    if (a.gradient)
        for (int64_t i = 0; i < n_rows; ++i) {
            Vec left{}, right{};
            for (int64_t r = 0; r < a.n_responses; ++r) {
                left += load(tiles + r * TILE + i * BLOCK);
                right += load(tiles + r * TILE + i * BLOCK + LANES);
            }
            float* target = a.gradient + (row + i) * a.d_in + column;
            if (n_columns == BLOCK) {
                store(target, load(target) + left);
                store(target + LANES, load(target + LANES) + right);
            } else {
                for (int64_t j = 0; j < n_columns; ++j) target[j] += j < LANES ? left[j] : right[j - LANES];
            }
        }
}

// One block of rows against STRIPS strips of columns; products: [responses][responses] of it alone.
template <class T>
void run_item(const Work& work, int64_t row_block, int64_t strip_block, const float* packed, Scratch& own,
              double* products, double* along) {
    const rlvr::Segmented& a = work.a;
    const int64_t row = row_block * work.rows, rows = a.d_out - row < work.rows ? a.d_out - row : work.rows;
    const int64_t last = (strip_block + 1) * STRIPS < work.strips ? (strip_block + 1) * STRIPS : work.strips;
    const int64_t n = work.responses;
    std::memset(own.products.data, 0, static_cast<size_t>(n * n) * sizeof(Double));
    std::memset(own.along.data, 0, static_cast<size_t>(n) * sizeof(Double));
    std::memset(own.tiles.data, 0, static_cast<size_t>(n * TILE) * 4);
    pack<T, ROWS>(work, &rlvr::Piece::b, &rlvr::Piece::b_stride, row, rows, own.b.data);
    for (int64_t strip = strip_block * STRIPS; strip < last; ++strip) {
        const float* const inputs = packed + strip * work.tokens * BLOCK;
        const int64_t column = strip * BLOCK, columns = a.d_in - column < BLOCK ? a.d_in - column : BLOCK;
        for (int64_t i = 0; i < rows; i += ROWS) {
            const float* const outputs = own.b.data + i * work.tokens;
            for (int64_t r = 0; r < a.n_responses; ++r)
                for (int64_t t = work.first[r]; t < work.first[r + 1]; t += K_BLOCK) {
                    const int64_t left = work.first[r + 1] - t;
                    const auto run = t == work.first[r] ? multiply_columns<false> : multiply_columns<true>;
                    run(inputs + t * BLOCK, outputs + t * ROWS, ROWS, left < K_BLOCK ? left : K_BLOCK,
                        own.tiles.data + r * TILE);
                }
            reduce(work, own, row + i, column, rows - i < ROWS ? rows - i : ROWS, columns);
        }
    }
    const auto* sums = reinterpret_cast<const Double*>(own.products.data);
    for (int64_t i = 0; i < n * n; ++i) products[i] = i % n >= i / n / 4 * 4 ? total(sums[i]) : 0.0;
    for (int64_t i = 0; i < n; ++i) along[i] = total(reinterpret_cast<const Double*>(own.along.data)[i]);
}

template <class T>
void run_typed(const rlvr::Segmented& a) {
    const Work work(a);
    const int64_t n = work.responses, items = work.row_blocks * work.strip_blocks, per_item = n * n + n;
    const int n_threads = useful_threads(a.n_threads, 2.0 * work.tokens * a.d_out * a.d_in);
    Aligned packed(work.strips * work.tokens * BLOCK);
    std::vector<double> partials(items * per_item);
    std::vector<std::unique_ptr<Scratch>> scratch;
    for (int i = 0; i < n_threads; ++i) scratch.push_back(std::make_unique<Scratch>(work));
    std::atomic<int64_t> next_strip{0}, next_item{0};
    Barrier barrier(n_threads);
    run_threads(n_threads, [&](int thread) {
        for (int64_t s; (s = next_strip.fetch_add(STRIPS)) < work.strips;) {
            const int64_t count = a.d_in - s * BLOCK < STRIPS * BLOCK ? a.d_in - s * BLOCK : STRIPS * BLOCK;
            pack<T, BLOCK>(work, &rlvr::Piece::a, &rlvr::Piece::a_stride, s * BLOCK, count,
                           packed.data + s * work.tokens * BLOCK);
        }
        barrier.wait();
        for (int64_t item; (item = next_item.fetch_add(1)) < items;)
            run_item<T>(work, item / work.strip_blocks, item % work.strip_blocks, packed.data, *scratch[thread],
                        partials.data() + item * per_item, partials.data() + item * per_item + n * n);
    });
    for (int64_t i = 0; i < a.n_responses; ++i) {
        for (int64_t j = i; j < a.n_responses; ++j) {
            double sum = 0;
            for (int64_t item = 0; item < items; ++item) sum += partials[item * per_item + i * n + j];
            a.gram[i * a.n_responses + j] = a.gram[j * a.n_responses + i] = sum;
        }
        if (!a.dots) continue;
        a.dots[i] = 0;
        for (int64_t item = 0; item < items; ++item) a.dots[i] += partials[item * per_item + n * n + i];
    }
}

void run(const rlvr::Segmented& a) {
    switch (a.dtype) {
        case rlvr::DType::float32: return run_typed<float>(a);
        case rlvr::DType::bfloat16: return run_typed<BFloat16>(a);
        case rlvr::DType::float16: return run_typed<Float16>(a);
    }
}

}  // namespace
}  // namespace segmented
