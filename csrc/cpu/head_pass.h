// The head pass on a CPU: arguments and the entry point of each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rlvr {

// raw = hidden . weight^T + bias;  z = cap * tanh(raw / cap) / T;  p = softmax(z).  All pointers are contiguous.
struct HeadInputs {
    DType dtype;
    const void* hidden;     // [n_tokens, width]
    const void* weight;     // [vocabulary, width]
    const float* bias;      // [vocabulary] or null
    const int64_t* tokens;  // [n_tokens], each in [0, vocabulary), or -1: sampled from another shard of the vocabulary
    int64_t n_tokens, vocabulary, width;
    float inverse_temperature;
    float softcap;  // 0: none
    int n_threads;
};

struct HeadPass : HeadInputs {
    float *logp, *lse, *entropy, *sum_p_sq, *score_sq, *off_mass;  // [n_tokens] each

    // Optional per-response sums of the score, sums[r, v] = sum over tokens t of response r of c_t dlogp_t / draw_v.
    float* sums;                // [n_responses, vocabulary], overwritten; null: not wanted
    const float* coefficients;  // [n_tokens]
    const int64_t* cu_seqlens;  // [n_responses + 1]
    int64_t n_responses;

    // With sums of a shard of the vocabulary: called on the calling thread once the statistics of tokens
    // [first, first + count) are known, to put those of the whole vocabulary in their place before they are used.
    // Every token belongs to one call, and which does depends on width alone. It throws nothing; false ends the calls,
    // and leaves results that mean nothing. Null: the vocabulary is whole.
    bool (*merge)(void* context, int64_t first, int64_t count);
    void* merge_context;
};

void head_pass_baseline(const HeadPass&);
#if defined(__x86_64__)
void head_pass_avx2(const HeadPass&);
void head_pass_avx512(const HeadPass&);
#endif

}  // namespace rlvr
