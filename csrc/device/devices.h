// SPDX-License-Identifier: Apache-2.0
// The rings of this process, one per compute device; reservations, and settings of new rings.
#pragma once

#include <memory>
#include <string>

#include "engine/ring.h"

namespace distorch {

// The ring of a compute device ("cpu", "cuda:0"). It lives as long as anybody
// holds it: weights and reservations do.
std::shared_ptr<Ring> ring_for(const std::string& device);

// Room for look-ahead on one device, given back with this object.
class Reservation {
 public:
  Reservation(const std::string& device, uint64_t bytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

 private:
  friend uint64_t reserved_beside(const std::string& device, const Reservation* own);
  const std::shared_ptr<Ring> ring_;
  const uint64_t ticket_;
};

// Bytes of look-ahead that the device keeps for others than `own`, which may be null.
uint64_t reserved_beside(const std::string& device, const Reservation* own);

// Threads that read files; takes effect for rings made afterwards.
void set_io_threads(size_t threads);

}  // namespace distorch
