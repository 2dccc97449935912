// SPDX-License-Identifier: Apache-2.0
// A sharded weight as the engine sees it: bytes on a donor, maybe a slot in a ring.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "core/mutex.h"
#include "engine/forecast.h"
#include "engine/source.h"

namespace distorch {

class Ring;
struct Slot;

// A time that only a device knows, and only when its work is done.
class LateTime {
 public:
  virtual ~LateTime() = default;
  virtual bool known() const = 0;      // asks, does not wait
  virtual uint64_t nanoseconds() = 0;  // waits
};

// What a group of weights (usually one model) has asked of its donors.
struct Counters {
  uint64_t id = 0;
  std::atomic<uint64_t> hits{0};       // a weight was asked for, and its slot was ready or stored
  std::atomic<uint64_t> misses{0};     // it was not
  std::atomic<uint64_t> stall_ns{0};   // time that ops waited, as far as the host knows
  std::atomic<uint64_t> overflows{0};  // fetches for which the ring had no room
  void reset();
  // Time that an op waits for on its device. Held until it is known, a bounded
  // number of them: a device that is further behind is not timed.
  void stalls(std::unique_ptr<LateTime> time);
  // All of it. Waits for the devices.
  uint64_t all_stall_ns();
  // Of the work that is done. Does not wait, so that somebody may watch while a model runs.
  uint64_t known_stall_ns();
  // Bytes that came from a tier.
  void travelled(const std::string& tier, uint64_t bytes);
  std::map<std::string, uint64_t> bytes() const;

  // New ones, all zero. Their memory may have been other counters, which nobody held any more. It
  // is never freed, because a fetch that is under way goes on counting where it began to
  // (count_in).
  static std::shared_ptr<Counters> make();
  // The living counters of that id, or null.
  static std::shared_ptr<Counters> find(uint64_t id);

 private:
  // Moves times that are known by now from `later_` to `stall_ns`.
  void add_known() REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::map<std::string, uint64_t> bytes_ GUARDED_BY(mutex_);
  std::deque<std::unique_ptr<LateTime>> later_ GUARDED_BY(mutex_);
};

// Every fetch of this process, whatever the model.
inline std::atomic<uint64_t> process_fetches{0};

// Note [Copies that a weight adopts]
// A thread may copy a weight to a better place and then have the weight adopt the copy (adopt in
// ops/ops.cpp). Another thread may write to the weight meanwhile, or move it. Then the copy may
// have old bytes, and must not be adopted. So the first thread asks for moves() before it copies,
// and move_to() refuses when the number has changed since.
//
// The number changes when a move begins or bytes begin to go to the donor, because a copy may be
// under way that has read old bytes. It changes again when the donor has the new bytes, because a
// copy that began in between may have read some of both. It changes a third time in changed().
// Until then, a copy may read old bytes in a slot of the ring, or in the memory that operators use
// in place.
//
// A copy may be adopted while a write is under way. The write finds that out, and brings its bytes
// to the adopted copy, too (Weight::store).
//
// Operators that write to a donor's own memory, in place, are not counted: who copies a weight that
// does not travel has to know that nobody writes to it. Nor is an operator that fails after it has
// written to a part of a slot.
class Weight {
 public:
  // `ring` brings the bytes of donors that cannot be used in place.
  Weight(std::string name, Source source, std::shared_ptr<Ring> ring,
         std::shared_ptr<Counters> counters);
  ~Weight();
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;

  uint64_t id() const { return id_; }
  const std::string& name() const { return name_; }
  uint64_t size() const { return source().size(); }
  Source source() const;
  // What `look` says of the source. Meanwhile the weight keeps it, so this thread cannot become the
  // last holder of a donor. The weight's mutex is held: `look` waits for nothing.
  template <typename Look>
  auto ask_source(const Look& look) const {
    const MutexLock lock(mutex_);
    return look(source_);
  }
  std::shared_ptr<Donor> donor() const { return source().donor; }
  Ring& ring() const { return *ring_; }
  Counters& counters() const { return *counters_.load(std::memory_order_acquire); }
  // From now on. A fetch that is under way goes on counting in the old ones.
  void count_in(std::shared_ptr<Counters> counters);
  // See Note [Copies that a weight adopts].
  uint64_t moves() const;
  // From now on made of something else, unless moves() is not what was `expected`. False: it is
  // not. Call changed() afterwards.
  bool move_to(Source source, std::optional<uint64_t> expected = std::nullopt);

  // Brings [begin, begin + bytes) of `whole`, which has all bytes of the weight, to the donor. A
  // checkpoint is never written: the weight moves to scratch memory or a scratch file first. A
  // weight that was decoded is plain bytes from then on. `total` other than size() resizes it.
  // Throws Error(kFetch / kPlacement). The donor then has its old bytes. Call changed() afterwards.
  void store(const std::byte* whole, uint64_t total, uint64_t begin, uint64_t bytes);

  // The last step of a move or a write. The ring drops the fetched bytes of the weight, which are
  // the old ones. It keeps those at `written`, where an operator wrote the new ones. Null: nowhere.
  void changed(const std::byte* written = nullptr);

  // The ring's own bookkeeping, guarded by the ring's mutex.
  struct InRing {
    std::shared_ptr<Slot> slot;
    const Forecast::Outlook* outlook = nullptr;  // while the ring knows the weight
    int writers = 0;                             // see Ring::Write
  };
  InRing in_ring;

 private:
  // Around a write to the donor of the source that the first gives. False: the weight is made of
  // something else now.
  Source begin_write();
  bool end_write(const Source& written);

  const uint64_t id_;
  const std::string name_;
  const std::shared_ptr<Ring> ring_;
  mutable Mutex mutex_;
  Source source_ GUARDED_BY(mutex_);
  uint64_t moves_ GUARDED_BY(mutex_) = 0;
  std::atomic<Counters*> counters_;
  std::shared_ptr<Counters> counters_owner_ GUARDED_BY(mutex_);
};

}  // namespace distorch
