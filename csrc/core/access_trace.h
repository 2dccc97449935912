// SPDX-License-Identifier: Apache-2.0
// What comes next: the order of weights, learned from the passes seen so far.
//
// Note [Prediction by replay]
// The whole past is kept (bounded), and a cursor replays it: while the present
// equals the replayed past, the prediction is what followed then. On a
// surprise the cursor jumps to the place whose recent past agrees longest with
// ours, of the last 15 places of the same id, and to the newest of equals. A model that repeats one
// pass is replayed one pass behind; one that alternates passes (conditional / unconditional, with
// layers skipped in one) settles two passes behind after two surprises; a backward pass or a tied
// weight used twice is told apart by what came before it.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <unordered_map>

namespace distorch {

class AccessTrace {
 public:
  using Id = uint64_t;

  explicit AccessTrace(size_t limit = 1 << 15) : limit_(limit) {}

  // Appends an access. True: it is the one that was predicted, so predictions
  // shift by one; false: they are all new. A repeat of the last access is not
  // recorded (and returns true).
  bool record(Id id);

  // The k-th access from now (k = 0 is the next), or nothing when unknown.
  // Beyond the recorded past the replayed period is taken to repeat.
  std::optional<Id> predict(size_t k) const;

  // Accesses between the present and the replayed past; 0 = no prediction.
  size_t period() const { return following_ ? end() - cursor_ : 0; }
  bool last_was(Id id) const { return !past_.empty() && past_.back().id == id; }

 private:
  static constexpr uint64_t kNowhere = ~uint64_t{0};

  struct Access {
    Id id;
    uint64_t before;  // position of the access before to the same id, or kNowhere
  };

  uint64_t end() const { return first_ + past_.size(); }
  Id at(uint64_t position) const { return past_[position - first_].id; }
  void append(Id id);
  void resync();
  size_t agreement(uint64_t position) const;

  size_t limit_;
  std::deque<Access> past_;
  uint64_t first_ = 0;   // position of past_.front()
  uint64_t cursor_ = 0;  // position of the predicted next access
  bool following_ = false;
  // The newest position of each id. From there, `before` leads back to all others. A weight that is
  // made anew at every load has an id of its own each time, so an id costs little here.
  std::unordered_map<Id, uint64_t> newest_;
};

}  // namespace distorch
