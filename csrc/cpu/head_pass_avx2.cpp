// The head pass for AVX2 + FMA: 16 registers hold a 6 x 16 tile.
#if defined(__x86_64__)
#include "kernels_system.h"
#pragma GCC target("avx2,fma")
#define RLVR_LANES 8
#define RLVR_ROWS 6
#include "head_pass_kernel.h"

void rlvr::head_pass_avx2(const HeadPass& arguments) { ::head_pass(arguments); }
#endif
