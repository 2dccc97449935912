// SPDX-License-Identifier: Apache-2.0
// Who read and wrote which bytes, and whether that was ordered.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace distorch::sim {

// clock[s]: how much of stream s is known to have happened before.
using VectorClock = std::vector<uint64_t>;
void merge(VectorClock& into, const VectorClock& from);

struct Access {
  uintptr_t begin, end;
  bool writes;
};

// Note [Races]
// Every piece of work has a vector clock when it is issued. It may read what
// another wrote, and write what others read or wrote, only if it knows that
// they ended, through an event or the host, whatever the order in which they
// happened to run. The host takes part as one more stream.
class Ledger {
 public:
  void access(const Access& access, size_t stream, const VectorClock& clock,
              const std::string& label);
  // The memory is gone: nothing can race with it any more.
  void forget(uintptr_t begin, uintptr_t end);
  void clear_races() { races_.clear(); }
  const std::vector<std::string>& races() const { return races_; }

 private:
  struct Past {
    size_t stream = 0;
    uint64_t tick = 0;  // 0: never
    std::string label;
  };
  struct Range {
    uintptr_t end = 0;
    Past written;
    std::vector<Past> read;  // the last of each stream
  };

  void split(uintptr_t at);
  void check(const Past& past, const char* did, const Access& access, size_t stream,
             const VectorClock& clock, const std::string& label);

  std::map<uintptr_t, Range> ranges_;  // by their begin
  std::vector<std::string> races_;
};

}  // namespace distorch::sim
