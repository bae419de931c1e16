// Per-response gradients for the compiler's default instruction set: 128-bit vectors (SSE2, NEON).
#define RLVR_LANES 4
#define RLVR_ROWS 6
#include "fold_kernel.h"
#include "segmented_kernel.h"

void rlvr::fold_rows_baseline(const FoldRows& arguments) { fold::run(arguments); }
void rlvr::segmented_baseline(const Segmented& arguments) { segmented::run(arguments); }
