// The head pass and its gradients for AVX-512: 32 registers hold a 12 x 32 tile.
#if defined(__x86_64__)
#include "kernels_system.h"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define RLVR_LANES 16
#define RLVR_ROWS 12
#include "head_gradient_kernel.h"
#include "head_pass_kernel.h"

void rlvr::head_gradient_avx512(const HeadGradient& arguments) { head_gradient::run(arguments); }
void rlvr::head_pass_avx512(const HeadPass& arguments) { ::head_pass(arguments); }
#endif
