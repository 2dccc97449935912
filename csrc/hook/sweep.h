// SPDX-License-Identifier: Apache-2.0
// Per-operator registrations at the hook's key.
#pragma once

#include <cstddef>

namespace distorch {

// Note [Why a fallback is not enough]
// A backend fallback is the dispatcher's last resort: kernels of the aliases
// CompositeExplicitAutograd and CompositeImplicitAutograd count as kernels of
// every backend key and win over it. An operator with an explicit composite
// kernel, or with an implicit one *and* its own backend kernel, would run a
// composite with other last bits, or one that reads memory. And views need no
// bytes at all. So every operator is looked at once, and those that the
// fallback does not reach get a registration of their own: when a tensor is
// sharded, and when an operator meets one after a library added others.

// Registers what is missing for all operators known now. Cheap when no
// operator was added since the last call. Must not run inside a registration.
// Returns the number of registrations made.
size_t sweep_operators();

}  // namespace distorch
