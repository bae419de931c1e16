// The head pass and its gradients for AVX2 + FMA: 16 registers hold a 6 x 16 tile.
#if defined(__x86_64__)
#include "kernels_system.h"
#pragma GCC target("avx2,fma")
#define RLVR_LANES 8
#define RLVR_ROWS 6
#include "head_gradient_kernel.h"
#include "head_pass_kernel.h"

void rlvr::head_gradient_avx2(const HeadGradient& arguments) { head_gradient::run(arguments); }
void rlvr::head_pass_avx2(const HeadPass& arguments) { ::head_pass(arguments); }
#endif
