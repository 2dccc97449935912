// SPDX-License-Identifier: Apache-2.0
// The floating-point types that kernels of ours read and write.
#pragma once

namespace distorch {

enum class Element { kFloat32, kFloat16, kBFloat16 };

constexpr int element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

}  // namespace distorch
