// The head pass and its gradients for the compiler's default instruction set: 128-bit vectors (SSE2, NEON).
#define RLVR_LANES 4
#define RLVR_ROWS 6
#include "head_gradient_kernel.h"
#include "head_pass_kernel.h"

void rlvr::head_gradient_baseline(const HeadGradient& arguments) { head_gradient::run(arguments); }
void rlvr::head_pass_baseline(const HeadPass& arguments) { ::head_pass(arguments); }
