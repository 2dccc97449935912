// SPDX-License-Identifier: Apache-2.0
// Checks for test programs: each is a program that exits with 0 when all hold.
#pragma once

#include <cstdlib>
#include <iostream>
#include <random>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << std::endl; \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

// The error kind that `action` throws, or a failed check.
#define CHECK_THROWS(kind_wanted, action)                        \
  do {                                                           \
    bool thrown = false;                                         \
    try {                                                        \
      action;                                                    \
    } catch (const distorch::Error& error) {                     \
      thrown = error.kind() == distorch::ErrorKind::kind_wanted; \
      CHECK(std::string(error.what()).size() > 10);              \
    }                                                            \
    CHECK(thrown);                                               \
  } while (false)
