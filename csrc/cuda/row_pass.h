// The row pass as a plain C++ function, and how it is laid out on a chip. No CUDA types: bindings and tests include it.
#pragma once

#include <cstdint>

namespace rlvr {

enum class DType : int { Float32 = 0, BFloat16 = 1, Float16 = 2 };

inline int64_t bytes_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

// What a row of the grid needs to know. Strides are in elements.
struct RowPass {
    const void* logits;    // [rows, vocabulary]
    int64_t logits_stride;
    const int64_t* tokens;  // [rows]; -1: in another shard of the vocabulary
    void* block;            // [rows, vocabulary] or null: receives the derivatives; may be the logits themselves
    int64_t block_stride;
    float* results;         // [6, rows]: logp, lse, entropy, sum_p_sq, score_sq, off_mass
    int64_t rows;
    int vocabulary;         // below 2^30: columns are 32-bit within a row
    float inverse_temperature;
    float softcap;          // 0: none
    // From the layout:
    int own_vectors;        // vectors of 16 bytes that each thread block of a row owns
    bool wide;              // logits and block move in such vectors
    bool resident;          // the row stays in shared memory between the sweeps
};

// How many thread blocks share a row, and what each holds.
struct Layout {
    int cluster;
    int threads;
    int own_vectors;
    int64_t shared_bytes;  // 0: the row is read again from memory
};

constexpr int VECTOR_BYTES = 16, STREAMING_THREADS = 512, RESIDENT_THREADS = 1024;

// Statistics alone need no second look: one block streams the row. Else the fewest blocks whose shared memory holds it,
// at least `smallest`; none can where the row exceeds `largest` blocks' share.
inline Layout row_layout(int64_t vocabulary, DType logits, bool second_sweep, int64_t shared_limit, int smallest,
                         int largest) {
    const int64_t vectors = (vocabulary * bytes_of(logits) + VECTOR_BYTES - 1) / VECTOR_BYTES;
    if (second_sweep)
        for (int cluster = smallest; cluster <= largest; cluster *= 2) {
            const int64_t own = (vectors + cluster - 1) / cluster;
            if (own * VECTOR_BYTES <= shared_limit)
                return {cluster, RESIDENT_THREADS, static_cast<int>(own), own * VECTOR_BYTES};
        }
    return {1, STREAMING_THREADS, static_cast<int>(vectors), 0};
}

inline RowPass with_layout(RowPass a, DType logits, DType block, const Layout& layout) {
    const auto aligned = [](const void* base, int64_t stride, DType dtype) {
        const auto address = reinterpret_cast<std::uintptr_t>(base);
        return address % VECTOR_BYTES == 0 && stride * bytes_of(dtype) % VECTOR_BYTES == 0;
    };
    a.own_vectors = layout.own_vectors;
    a.wide = aligned(a.logits, a.logits_stride, logits) && aligned(a.block, a.block_stride, block);
    a.resident = layout.shared_bytes > 0;
    return a;
}

// Runs on `stream` of `device`. `smallest_cluster`: 1, 2, 4 or 8; more than needed leaves shared memory for a second row
// on each multiprocessor. Throws std::runtime_error naming what failed.
void run_row_pass(const RowPass& row_pass, DType logits, DType block, int device, void* stream, int smallest_cluster);

// The layout that run_row_pass takes on `device`.
Layout row_layout_on(int64_t vocabulary, DType logits, bool second_sweep, int device, int smallest_cluster);

}  // namespace rlvr
