// Per-response gradients for AVX-512: 32 registers hold a 12 x 32 tile.
#if defined(__x86_64__)
#include "kernels_system.h"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define RLVR_LANES 16
#define RLVR_ROWS 12
#include "fold_kernel.h"
#include "segmented_kernel.h"

void rlvr::fold_rows_avx512(const FoldRows& arguments) { fold::run(arguments); }
void rlvr::segmented_avx512(const Segmented& arguments) { segmented::run(arguments); }
#endif
