// The number types that tensors come in.
#pragma once

namespace rlvr {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace rlvr
