// Launches the row pass: layout from the chip's shared memory, every error of the CUDA runtime made an exception.
#include "row_pass.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "row_pass_kernel.cuh"

namespace rlvr {
namespace {

constexpr int LARGEST_CLUSTER = 8;  // what every chip with clusters can form

void check(cudaError_t error, const std::string& action) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a launch error is remembered: leave the caller a clean state
    throw std::runtime_error("row pass: " + action + " failed: " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device, const char* name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), std::string("asking device ") + std::to_string(device) +
                                                             " for its " + name);
    return value;
}

class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        check(cudaSetDevice(device), "selecting device " + std::to_string(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

}  // namespace

Layout row_layout_on(int64_t vocabulary, DType logits, bool second_sweep, int device, int smallest_cluster) {
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, "shared memory limit");
    const int has_clusters = attribute(cudaDevAttrClusterLaunch, device, "support of clusters");
    const int64_t for_rows = shared - static_cast<int64_t>(MAX_WARPS * sizeof(Statistics));
    return row_layout(vocabulary, logits, second_sweep, for_rows, smallest_cluster,
                      has_clusters ? LARGEST_CLUSTER : 1);
}

void run_row_pass(const RowPass& row_pass, DType logits, DType block, int device, void* stream, int smallest_cluster) {
    const OnDevice guard(device);
    const bool has_block = row_pass.block != nullptr;
    const Layout layout = row_layout_on(row_pass.vocabulary, logits, has_block, device, smallest_cluster);
    const RowKernel kernel = row_kernel(logits, block, has_block, row_pass.softcap != 0.0f);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(layout.shared_bytes)),
          "reserving " + std::to_string(layout.shared_bytes) + " bytes of shared memory");

    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(layout.cluster), 1, 1};
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(row_pass.rows * layout.cluster));
    configuration.blockDim = dim3(layout.threads);
    configuration.dynamicSmemBytes = layout.shared_bytes;
    configuration.stream = static_cast<cudaStream_t>(stream);
    configuration.attrs = &cluster;
    configuration.numAttrs = layout.cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&configuration, kernel, with_layout(row_pass, logits, block, layout)),
          "launching " + std::to_string(row_pass.rows) + " rows of " + std::to_string(row_pass.vocabulary) +
              " logits in clusters of " + std::to_string(layout.cluster));
}

}  // namespace rlvr
