// SPDX-License-Identifier: Apache-2.0
// Errors of the library's lower layers. They become the Python classes of the
// same names at the border (bindings/errors.cpp).
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace distorch {

enum class ErrorKind {
  kPlacement,  // what was asked cannot be honoured on this machine
  kFormat,     // a file is damaged or of an unknown kind
  kFetch,      // bytes could not be brought, or could not be written back
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace distorch
