// SPDX-License-Identifier: Apache-2.0
// What comes next: the weights that each thread is about to use, in their order.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <thread>
#include <unordered_map>

#include "core/access_trace.h"
#include "core/layout.h"

namespace distorch {

// Note [What comes next]
// A forecast is about numbers. A weight is an id. The clock counts calls of window(): one for each
// fetch and one for each operator that ends, so about two for each use. There is no device and no
// memory here, and no lock: a ring has one forecast and guards it with the ring's mutex.
//
// Each thread has a window of its own. A window is the past of that thread (AccessTrace) and a
// queue of coming uses for which the weights have been prepared already.
// * use() says that the thread uses a weight now. If the queue has foreseen it, the queue moves up
//   by one. If not, the queue was wrong and is emptied. It is also emptied if it was made of
//   suggestions and the past, which has just begun to repeat, says otherwise.
// * next() says which use follows the last one in the queue.
// * prepared() puts that use at the end of the queue.
// A weight in any queue is wanted. Its owner keeps it until the uses have come.
//
// There are two sources. While a thread's past does not repeat, weights follow each other as
// suggest() says, which is the order in which the module has them, until they come back to the
// weight that is in use. As soon as the past repeats, only what was learned counts.
class Forecast {
 public:
  using Id = uint64_t;

  // What is known of one weight.
  struct Outlook {
    uint32_t wanted = 0;  // places that the weight has in the queues of all windows
    Id likely_next = 0;   // the weight that is suggested to follow; 0: none
  };

  // The past and the queue of one thread.
  struct Window {
    AccessTrace trace;
    Id latest = 0;           // the weight that was used last
    std::deque<Id> queue;    // the nearest use first
    uint64_t looked_at = 0;  // by the clock
  };

  // So many threads are remembered. Of more, the one that was seen longest ago is forgotten.
  static constexpr size_t kMaxWindows = 32;

  // A weight is there. Its outlook is kept up to date until the weight is removed. REQUIRES: no
  // weight had this id before.
  const Outlook& add(Id id) { return outlooks_[id]; }
  // A weight is gone, and is not wanted any more. A queue that has it is emptied when its turn
  // comes, since another weight is used then.
  void remove(Id id) { outlooks_.erase(id); }
  // `next` is likely to follow `id`. REQUIRES: `id` is there.
  void suggest(Id id, Id next) { outlooks_.at(id).likely_next = next; }

  // The window of a thread; valid until the next call of window(). The clock moves on by one. A
  // thread that is new gets the past of the thread that was seen last, an empty queue, and no
  // latest use.
  Window& window(std::thread::id thread);
  // The thread uses `id`. A repetition of its latest use changes nothing.
  void use(Window& window, Id id);
  // The use that follows the last one in the queue. Nothing if it is not known, or if the queue
  // has a whole pass already: as many uses as the past's period has, or as there are weights. It
  // may be a weight that was removed.
  std::optional<Id> next(const Window& window) const;
  // The use that next() gave joins the queue.
  void prepared(Window& window, Id id);

  // Empties the queue of a window, of all windows, or of all but one.
  void forget(Window& window);
  void forget_all() { forget_others(nullptr); }
  void forget_others(const Window* kept);

  // Whether `id` is in the queue.
  static bool wants(const Window& window, Id id);
  // Uses of that thread from now until all uses of `id` in its queue have come; 0 if there are
  // none. kNotKnown if the queue of another thread has it.
  uint64_t uses_until_done(const Window& window, Id id) const;
  // Calls of window() until now.
  uint64_t clock() const { return clock_; }
  size_t weights() const { return outlooks_.size(); }

 private:
  void want(Id id, int more);

  std::unordered_map<Id, Outlook> outlooks_;
  std::unordered_map<std::thread::id, Window> windows_;
  uint64_t clock_ = 0;
  // The thread that was seen last. Most programs have only one.
  std::thread::id latest_thread_;
  Window* latest_window_ = nullptr;
};

}  // namespace distorch
