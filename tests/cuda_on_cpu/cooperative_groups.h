// Clusters of thread blocks, as cuda_on_cpu.h runs them.
#pragma once

#include "cuda_on_cpu.h"

namespace cooperative_groups {

struct cluster_group {
    int num_blocks() const { return on_cpu::block->cluster->anchors.size(); }
    int block_rank() const { return on_cpu::block->rank; }
    void sync() const {
        on_cpu::meet(on_cpu::block->everyone, blockDim.x, [] { on_cpu::block->cluster->meet(); });
    }
    // Thread-local variables lie at the same distance from one another in every thread.
    template <class T>
    T* map_shared_rank(T* own, int rank) const {
        char* const base = on_cpu::block->cluster->anchors[rank];
        if (base == nullptr) on_cpu::fail("a block has left while another needs its shared memory");
        return reinterpret_cast<T*>(base + (reinterpret_cast<char*>(own) - &on_cpu::anchor));
    }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
