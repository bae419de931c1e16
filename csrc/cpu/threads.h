// Threads of one call: started for it, joined before it returns.
#pragma once

#include "kernels_system.h"

namespace {

constexpr double THREAD_FLOPS = 4e6;  // starting a thread costs as much as about this

// At most `wanted` threads, as many as have something to do.
inline int useful_threads(int wanted, double flops) {
    const double useful = 1 + flops / THREAD_FLOPS;
    return useful < wanted ? static_cast<int>(useful) : wanted;
}

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

// Lets threads take turns at each of some places: turn 0 first, then 1, ... Who has turn k waits only for those before,
// so if turns are handed out in ascending order, somebody can always go on.
class Turns {
  public:
    explicit Turns(int64_t places) : turns_(places, 0) {}
    void wait(int64_t place, int64_t turn) {
        std::unique_lock<std::mutex> lock(mutex_);
        condition_.wait(lock, [&] { return turns_[place] == turn; });
    }
    void finish(int64_t place) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ++turns_[place];
        }
        condition_.notify_all();
    }

  private:
    std::vector<int64_t> turns_;
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

}  // namespace
