// The CUDA that the row pass uses, on the CPU: its kernel source compiles with g++ and runs, clusters included.
//
// A thread block is an operating-system thread, so that thread_local memory is its shared memory; its CUDA threads are
// fibers which switch at barriers and shuffles only. Shared memory starts as NaN. Fibers run forward or backward:
// results that need an order nobody guarantees differ. A barrier that some threads never reach, or a look into the
// shared memory of a block that has left, ends the process with a message.
#pragma once

#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ thread_local

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
inline thread_local Index threadIdx, blockIdx, blockDim;
inline int min(int a, int b) { return b < a ? b : a; }

namespace on_cpu {

constexpr int WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 128 << 10;

struct Meeting {  // of fibers: a barrier that can be used again
    unsigned arrived = 0, round = 0;
};

struct ClusterState {
    explicit ClusterState(int blocks) : barrier(blocks), anchors(blocks) {}
    std::barrier<> barrier;
    std::vector<char*> anchors;  // one address in the shared memory of each block; null once the block has left
    std::mutex turn;             // blocks run one at a time, from barrier to barrier

    void meet() {
        turn.unlock();
        barrier.arrive_and_wait();
        turn.lock();
    }
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "row pass on the CPU: %s\n", what);
    std::abort();
}

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    bool done = false;
};

struct Block {
    int rank = 0;
    ClusterState* cluster = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    std::vector<float> shuffled;
    Meeting everyone;
    ucontext_t scheduler;
    std::function<void()> body;
    bool progress = false;
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor;

inline void meet(Meeting& meeting, unsigned members, const std::function<void()>& when_complete = {}) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == members) {
        if (when_complete) when_complete();
        meeting = {0, round + 1};
        block->progress = true;
        return;
    }
    Fiber& self = block->fibers[threadIdx.x];
    while (meeting.round == round) swapcontext(&self.context, &block->scheduler);
}

inline void start_fiber() {
    block->body();
    block->fibers[threadIdx.x].done = true;
    block->progress = true;
}

inline void run_block(int index, int rank, int threads, ClusterState& cluster, bool backward,
                      const std::function<void()>& body) {
    Block own;
    block = &own;
    own.rank = rank;
    own.cluster = &cluster;
    own.body = body;
    own.fibers.resize(threads);
    own.warps.resize(threads / WARP_SIZE);
    own.shuffled.resize(threads);
    blockIdx.x = index;
    blockDim.x = threads;
    cluster.turn.lock();
    cluster.anchors[rank] = &anchor;
    cluster.meet();
    for (Fiber& fiber : own.fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = STACK_BYTES};
        fiber.context.uc_link = &own.scheduler;
        makecontext(&fiber.context, start_fiber, 0);
    }
    for (int running = threads; running > 0;) {
        own.progress = false;
        running = 0;
        for (int i = 0; i < threads; ++i) {
            threadIdx.x = backward ? threads - 1 - i : i;
            Fiber& fiber = own.fibers[threadIdx.x];
            if (!fiber.done) swapcontext(&own.scheduler, &fiber.context);
            running += !fiber.done;
        }
        if (!own.progress) fail("threads wait at a barrier that others never reach");
    }
    cluster.anchors[rank] = nullptr;
    cluster.turn.unlock();
}

// kernel<<<clusters * blocks, threads>>>(argument), one cluster at a time. `prepare` runs first in every block.
template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, int clusters, int blocks, int threads, bool backward,
            void (*prepare)()) {
    for (int c = 0; c < clusters; ++c) {
        ClusterState state(blocks);
        std::vector<std::thread> workers;
        for (int rank = 0; rank < blocks; ++rank)
            workers.emplace_back([&, rank] {
                prepare();
                run_block(c * blocks + rank, rank, threads, state, backward, [&] { kernel(argument); });
            });
        for (std::thread& worker : workers) worker.join();
    }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::meet(on_cpu::block->everyone, blockDim.x); }

inline float __shfl_down_sync(unsigned, float value, int distance) {
    on_cpu::Meeting& warp = on_cpu::block->warps[threadIdx.x / on_cpu::WARP_SIZE];
    std::vector<float>& shuffled = on_cpu::block->shuffled;
    const int lane = threadIdx.x % on_cpu::WARP_SIZE;
    shuffled[threadIdx.x] = value;
    on_cpu::meet(warp, on_cpu::WARP_SIZE);
    const float result = lane + distance < on_cpu::WARP_SIZE ? shuffled[threadIdx.x + distance] : value;
    on_cpu::meet(warp, on_cpu::WARP_SIZE);
    return result;
}
