// The backward of the head pass on a CPU: arguments and the entry point of each instruction set.
#pragma once

#include "head_pass.h"

namespace rlvr {

// Gradients of the sum over tokens of grad_logp logp + grad_entropy H. Those that are null are not wanted.
struct HeadGradient : HeadInputs {
    const float *lse, *entropy, *off_mass;  // [n_tokens] of the head pass; of a shard: over the whole vocabulary
    const float *grad_logp, *grad_entropy;  // [n_tokens]
    float* grad_hidden;                     // [n_tokens, width], of a shard: its share; all three overwritten
    float* grad_weight;                     // [vocabulary, width]
    float* grad_bias;                       // [vocabulary]
};

void head_gradient_baseline(const HeadGradient&);
#if defined(__x86_64__)
void head_gradient_avx2(const HeadGradient&);
void head_gradient_avx512(const HeadGradient&);
#endif

}  // namespace rlvr
