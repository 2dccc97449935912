// Ring: bounded memory on the compute device in which fetched weights live,
// and the look-ahead that keeps it full.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/access_trace.h"
#include "core/arena.h"
#include "core/error.h"
#include "core/io_pool.h"
#include "core/layout.h"
#include "engine/room.h"
#include "engine/waiting.h"
#include "engine/weight.h"

namespace distorch {

// Host memory that readers fill and a device then copies; aligned to kPage.
struct Staged {
  virtual ~Staged() = default;
  std::byte* data = nullptr;
};

// One weight's room in the ring. All members are guarded by the ring's mutex,
// but for the bytes themselves while `state` is kLoading.
struct Slot {
  Slot(Weight& owner, Source made_of)
      : name(owner.name()), weight(&owner), source(std::move(made_of)) {}

  // kStaged: in host memory, and the device was not yet asked to copy it.
  // kStored: its donor's bytes are there; who asks for the weight decodes them.
  enum class State { kLoading, kStaged, kStored, kReady, kFailed };
  std::shared_ptr<void> wrapped;
  std::byte* data = nullptr;   // null: of a decoded weight that has no room of its own yet
  std::shared_ptr<Room> room;  // null: overflow, or none needed yet
  uint64_t used_at = 0;        // when it was handed out, by the ring's clock
  State state = State::kLoading;
  const std::string name;  // the weight's, for messages
  Weight* weight;          // null once the weight has let go of the slot
  // What the slot is filled from. The weight may be made of something else by now.
  Source source;
  size_t parts_left = 0;
  bool overflow = false;  // ordinary memory: let go as soon as it was handed out
  std::string error;      // empty: it was only dropped, and is asked for again
  ErrorKind error_kind = ErrorKind::kFetch;
  std::exception_ptr out_of_order;  // the device's own error, which is about no weight
  std::list<std::shared_ptr<Slot>>::iterator place;
  // Of devices that are not the host: bytes that readers brought to host
  // memory, and what the device knows of the copies on their way.
  std::shared_ptr<Staged> staged;
  std::byte* staged_data = nullptr;
  std::shared_ptr<void> arrival;

  // Room on the device, behind the decoded bytes, for what is decoded to `data`;
  // null: in place.
  std::byte* stored = nullptr;
  bool asked = false;  // for all bytes of a decoded weight
  // What the host decodes: see Note [Who decodes]. Null: it is decoded, or kept as it is.
  const std::byte* encoded = nullptr;
  // Made of what is in host memory anyway: kept only while nothing else wants the
  // room.
  bool cheap = false;

  // Where the donor's bytes go.
  std::byte* landing() const { return stored != nullptr ? stored : data; }
  bool whole() const { return room == nullptr || room->complete(); }
};

// The compute device of a ring: the memory that it is cut from, the form in
// which ops hold a slot, and how bytes get there. Called with the ring's mutex
// held.
class RingDevice {
 public:
  virtual ~RingDevice() = default;
  // What slots are rounded up to.
  virtual uint64_t granule() const { return kPage; }
  // Aligned to granule(). Throws what an allocation on this device throws.
  virtual std::shared_ptr<std::byte> allocate(uint64_t bytes) = 0;
  // An object over [data, data + bytes) that keeps `block` alive: what operators
  // hold of `slot`.
  virtual std::shared_ptr<void> wrap(Slot& slot, std::byte* data, uint64_t bytes,
                                     std::shared_ptr<void> block) = 0;
  // Whether anybody but the ring holds the wrapped object.
  virtual bool in_use(const std::shared_ptr<void>& wrapped) const = 0;

  // Whether readers write to slots, and who asks for a weight decodes it.
  virtual bool is_host() const { return true; }
  // Whether the device copies from this donor by itself.
  virtual bool brings(const Donor&) const { return false; }
  // Whether what this thread issues now is recorded, to run later and more than
  // once: no place for a fetch.
  virtual bool recording() const { return false; }
  // Room for readers to put what the device then copies. Not of the host.
  virtual std::shared_ptr<Staged> staging(uint64_t bytes) { return nullptr; }
  // Whether slots may be filled part by part.
  virtual bool in_parts() const { return false; }
  // Asks for a copy of a part of the donor's bytes (or of what is staged) to the
  // slot, which is kept until the copy was issued.
  virtual void bring(const std::shared_ptr<Slot>& slot, Range part) {}
  // A slot that waits for readers has got more of its room: what is copied there
  // later goes behind what has used it until now, and behind nothing else.
  virtual void took(Slot& slot) {}
  // Issues what was asked for, in that order, behind everything that used the
  // slots' memory, and decodes it. Slots that are whole are then kReady, or
  // kFailed with an error; the latter are appended to `failed`. Where the device is
  // out of order, throws the device's own error, with all of them kFailed.
  virtual void flush(std::vector<std::shared_ptr<Slot>>* failed) {}
  // The slot's memory will be used for something else, whatever is on its way.
  virtual void dropped(Slot& slot) {}
  // All rows, for the calling thread, which waits. Without the ring's mutex, and
  // only on the host. Throws Error.
  virtual void decode(const Decoder& decoder, const std::byte* encoded, std::byte* into) {
    decoder.decode(0, decoder.rows(), encoded, into);
  }
  // The host is about to wait for the slot's bytes. True: the device finds out
  // by itself how long operators wait.
  virtual bool waits(Slot& slot) { return false; }
  // Operators issued from now on, by this thread, find the bytes in the slot;
  // the time they wait counts as a stall.
  virtual void lend(Slot& slot, Counters& counters) {}
};

// Note [Who decodes]
// On an accelerator the device does, behind its copies. On the host readers
// only read, and the thread that asks for a weight decodes it, with all threads
// that its operators have. Were it done ahead by readers, these would compete
// with the operator before: whose threads wait for each other, spinning, so that
// every core a reader takes costs two. What remains to overlap is what costs no
// core.
//
// So what is read ahead needs no more room than the donor's bytes: a large
// weight gets the room of its decoded bytes when it is asked for. Bytes read
// ahead lie at the end of the ring and leave a hole in front, that is enough for
// the largest weight, or for what operators have had decoded at once and found no
// room for, up to half of the ring (`spare_`); decoding there, again and again,
// finds it in the caches. Small ones have room for both from the start. Of
// weights in host memory nothing is brought ahead.

// Note [What the ring promises]
// * Bytes held by slots never exceed the capacity, but for fetches that found
//   no room (an op waits for them now): these take ordinary memory and give it
//   back after use. There is nothing to dead-lock on. Where the device has none
//   left, the ring gives up its own first.
// * A slot is refilled only when nobody else holds its storage. A room may be
//   promised to a weight before; whoever asks for a weight that has only a part
//   of its room gets another one.
// * Predictions decide what is fetched early and what is thrown out, nothing
//   else: a wrong one costs a read.
class Ring {
 public:
  Ring(std::unique_ptr<RingDevice> device, size_t io_threads);
  Ring(std::unique_ptr<RingDevice> device, std::unique_ptr<Executor> readers);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // The wrapped bytes of `weight`, read now if they are not there. Blocks.
  // Throws Error(kFetch) naming weight and donor.
  std::shared_ptr<void> acquire(Weight& weight);
  // Throws Error(kFetch) where a fetch would be recorded instead of done.
  void refuse_recording(const Weight& weight) const;

  // An op has been issued and let its weights go: their room is free for what
  // comes next, behind that op and no other.
  void released();

  // After an op wrote to a fetched weight: any other copy of it is stale.
  void written(Weight& weight, const std::byte* data);

  // While nothing was learned, `next` is taken to follow `weight`.
  void suggest(Weight& weight, uint64_t next);

  // Bytes of look-ahead. Several holders (models) share one ring: the largest
  // reservation counts. Returns a ticket for release().
  uint64_t reserve(uint64_t bytes);
  void release(uint64_t ticket);

  // The device is short of memory: all that no operator holds goes back to it,
  // and about one step long, fetches take ordinary memory.
  void give_back();

  uint64_t capacity() const;
  uint64_t used() const;

  // Around a fork of the process. The child's ring forgets what was on its way:
  // the threads that carried it are not there.
  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child();

  // Called by Weight only.
  void enlist(Weight& weight);
  void delist(Weight& weight);

 private:
  using SlotPtr = std::shared_ptr<Slot>;

  // The ring's mutex. Whoever lets go of a slot under it adds the slot's source to let_go_, so that
  // no donor or decoder ends before the mutex is given up. They may hold the last tensor over some
  // memory that Python knows, and the end of that one waits for the GIL: see
  // Note [Waiting for threads].
  class Lock {
   public:
    explicit Lock(const Ring& ring) : ring_(ring) { lock(); }
    ~Lock() {
      if (held_.owns_lock()) unlock();
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    void lock();
    void unlock();
    // Gives the mutex up for a while, at most until somebody notifies `condition`.
    void wait(std::condition_variable& condition);

   private:
    const Ring& ring_;
    std::unique_lock<std::mutex> held_{ring_.mutex_, std::defer_lock};
  };
  // The lock is given up as long as this lives.
  struct Unlocked {
    explicit Unlocked(Lock& held) : lock(held) { lock.unlock(); }
    ~Unlocked() { lock.lock(); }
    Lock& lock;
  };

  // What one thread did and what is under way for it.
  struct Window {
    AccessTrace trace;
    uint64_t latest = 0;         // the weight asked for last
    std::deque<uint64_t> ahead;  // weights already asked for, in order
    uint64_t used_at = 0;
    std::vector<SlotPtr> growing;  // that have a part of their room, in order
  };

  Window& window_of_this_thread();
  void advance(Window& window, uint64_t id);
  std::optional<uint64_t> expected_after(const Window& window, uint64_t last) const;
  void forget_predictions(Window& window);
  void look_ahead(Window& window);
  void ask_ahead(Window& window);
  std::shared_ptr<void> hand_out(const SlotPtr& slot);
  SlotPtr usable_slot(Weight& weight);
  // `window`: that looks ahead, if the weight is not asked for now.
  SlotPtr load(Weight& weight, IoPool::Urgency urgency, const Window* window);
  // `window`: that looks ahead or, now, whose predictions stay. `aside`: for bytes
  // to decode, which leave room for what is decoded.
  std::shared_ptr<Room> find_room(uint64_t bytes, IoPool::Urgency urgency, const Window* window,
                                  bool aside);
  void enter(const SlotPtr& slot, Weight& weight);
  bool is_large(uint64_t room) const;
  void expect_decoded(uint64_t room);
  bool may_stay(const Slot& slot) const;
  void room_to_decode(const SlotPtr& slot, const Window& window, Counters& counters);
  uint64_t room_for(uint64_t bytes) const;
  std::shared_ptr<Region> region();
  std::shared_ptr<Room> promised_room(uint64_t bytes, const Window& window);
  std::vector<Occupied> occupied(const Window& window, const std::vector<Range>& holes,
                                 bool evict_nothing) const;
  uint64_t free_after(const Slot& slot, const Window& window) const;
  std::shared_ptr<Room> carve(uint64_t bytes, std::optional<uint64_t> spare = std::nullopt);
  bool grow(const SlotPtr& slot);
  void fill(const SlotPtr& slot, Range part);
  void grow_all(Window& window);
  bool evictable(const Slot& slot) const;
  bool evict_one();
  void evict_from(Range range);
  void drop(const SlotPtr& slot);
  struct Waiter;
  void bring_staged();
  void fail(const SlotPtr& slot, ErrorKind kind, const std::string& why);
  void flush();
  struct FlushAtEnd;
  void queue_reads(const SlotPtr& slot, std::byte* into, uint64_t phase, IoPool::Urgency urgency);
  IoPool::Task part(const SlotPtr& slot, uint64_t bytes, std::function<void()> work);
  void finish_part(const SlotPtr& slot, const Error* error);
  void wait_for(const SlotPtr& slot, Counters& counters, Lock& lock);
  void decode(const SlotPtr& slot, Counters& counters, Lock& lock);
  std::shared_ptr<std::byte> ordinary_memory(uint64_t bytes);
  void let_go_of_region();
  void resize();

  const std::unique_ptr<RingDevice> device_;
  mutable std::mutex mutex_;
  std::unique_ptr<std::condition_variable> part_done_ = std::make_unique<std::condition_variable>();
  // Everything below is guarded by mutex_.
  std::shared_ptr<Region> region_;
  uint64_t capacity_ = 0;
  uint64_t spare_ = 0;  // bytes that looking ahead leaves free; see Note [Who decodes]
  size_t lean_ = 0;     // fetches until the ring takes memory again
  std::unordered_map<uint64_t, uint64_t> reservations_;  // ticket -> bytes
  uint64_t next_ticket_ = 1;
  uint64_t clock_ = 0;
  std::unordered_map<uint64_t, Weight*> weights_;
  std::unordered_map<std::thread::id, Window> windows_;
  std::thread::id latest_thread_;       // whose window was asked for last,
  Window* latest_window_ = nullptr;     // and that window
  std::list<SlotPtr> slots_;            // least recently used first
  std::vector<SlotPtr> staged_;         // read to host memory, not yet copied
  mutable std::vector<Source> let_go_;  // after the mutex was given up: see Lock
  // Last, so that its threads end before what they use.
  const std::unique_ptr<Executor> pool_;
};

}  // namespace distorch
