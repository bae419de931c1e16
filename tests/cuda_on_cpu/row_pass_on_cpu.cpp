// The row pass with its layout and its kernel as they are, on the CPU. Called through ctypes.
#include "cuda_on_cpu.h"

namespace rlvr {
constexpr int64_t RESIDENT_VECTORS = 4096;
thread_local uint4 resident_vectors[RESIDENT_VECTORS];  // the kernel's dynamic shared memory
}  // namespace rlvr

#include "row_pass_kernel.cuh"

using namespace rlvr;

static void fill_with_nan() { std::memset(resident_vectors, 0xff, sizeof resident_vectors); }

extern "C" int row_pass_on_cpu(int logits_dtype, const void* logits, int64_t logits_stride, const int64_t* tokens,
                               int block_dtype, void* block, int64_t block_stride, int64_t rows, int vocabulary,
                               float inverse_temperature, float softcap, float* results, int64_t shared_limit,
                               int smallest_cluster, int largest_cluster, int threads, bool backward) {
    const auto element = static_cast<DType>(logits_dtype), entry = static_cast<DType>(block_dtype);
    if (shared_limit > RESIDENT_VECTORS * VECTOR_BYTES) return -1;
    RowPass a{};
    a.logits = logits;
    a.logits_stride = logits_stride;
    a.tokens = tokens;
    a.block = block;
    a.block_stride = block_stride;
    a.results = results;
    a.rows = rows;
    a.vocabulary = vocabulary;
    a.inverse_temperature = inverse_temperature;
    a.softcap = softcap;
    const Layout layout = row_layout(vocabulary, element, block, shared_limit, smallest_cluster, largest_cluster);
    const RowPass laid_out = with_layout(a, element, entry, layout);
    on_cpu::launch(row_kernel(element, entry, block, softcap != 0.0f), laid_out, static_cast<int>(rows),
                   layout.cluster, threads, backward, fill_with_nan);
    return layout.cluster;
}

extern "C" void row_layout_of(int dtype, int64_t vocabulary, bool second_sweep, int64_t shared_limit,
                              int smallest_cluster, int largest_cluster, int64_t* cluster_and_bytes) {
    const Layout layout = row_layout(vocabulary, static_cast<DType>(dtype), second_sweep, shared_limit,
                                     smallest_cluster, largest_cluster);
    cluster_and_bytes[0] = layout.cluster;
    cluster_and_bytes[1] = layout.shared_bytes;
}
