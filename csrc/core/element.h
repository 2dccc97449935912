// The floating-point types that kernels of ours read and write.
#pragma once

#include <cstdint>

namespace distorch {

enum class Element { kFloat32, kFloat16, kBFloat16 };

}  // namespace distorch
