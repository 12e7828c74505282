#pragma once

namespace ncfast {

// The element types an operation may be handed; the values are those of ncfast/ops/dispatch.py.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

}  // namespace ncfast
