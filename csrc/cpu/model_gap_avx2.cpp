// Per-response gradients for AVX2 + FMA: 16 registers hold a 6 x 16 tile.
#if defined(__x86_64__)
#include "kernels_system.h"
#pragma GCC target("avx2,fma")
#define RLVR_LANES 8
#define RLVR_ROWS 6
#include "fold_kernel.h"
#include "segmented_kernel.h"

void rlvr::fold_rows_avx2(const FoldRows& arguments) { fold::run(arguments); }
void rlvr::segmented_avx2(const Segmented& arguments) { segmented::run(arguments); }
#endif
