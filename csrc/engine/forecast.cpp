// SPDX-License-Identifier: Apache-2.0
#include "engine/forecast.h"

#include <algorithm>
#include <utility>

namespace distorch {

Forecast::Window& Forecast::window(std::thread::id thread) {
  if (latest_window_ == nullptr || thread != latest_thread_) {
    const auto earlier = [](const auto& a, const auto& b) {
      return a.second.looked_at < b.second.looked_at;
    };
    if (!windows_.contains(thread)) {
      Window fresh;
      if (!windows_.empty()) {
        fresh.trace = std::max_element(windows_.begin(), windows_.end(), earlier)->second.trace;
      }
      if (windows_.size() >= kMaxWindows) {
        const auto oldest = std::min_element(windows_.begin(), windows_.end(), earlier);
        forget(oldest->second);
        windows_.erase(oldest);
      }
      windows_.emplace(thread, std::move(fresh));
    }
    latest_thread_ = thread;
    latest_window_ = &windows_.at(thread);
  }
  latest_window_->looked_at = ++clock_;
  return *latest_window_;
}

void Forecast::use(Window& window, Id id) {
  if (window.latest == id) return;
  window.latest = id;
  const bool trace_foresaw = window.trace.record(id);
  const bool foreseen = !window.queue.empty() && window.queue.front() == id;
  if (!foreseen) return forget(window);
  want(id, -1);
  window.queue.pop_front();
  if (trace_foresaw) return;
  // The queue was made of suggestions. What was learned just now may say otherwise.
  for (size_t i = 0; i < window.queue.size(); ++i) {
    const auto known = window.trace.predict(i);
    if (known && *known != window.queue[i]) return forget(window);
  }
}

std::optional<Forecast::Id> Forecast::next(const Window& window) const {
  const size_t ahead = window.queue.size();
  if (const size_t period = window.trace.period(); period > 0) {
    return ahead < period ? window.trace.predict(ahead) : std::nullopt;
  }
  const auto last = outlooks_.find(ahead > 0 ? window.queue.back() : window.latest);
  if (last == outlooks_.end() || ahead >= outlooks_.size()) return std::nullopt;
  const Id next = last->second.likely_next;
  if (next == 0 || next == window.latest) return std::nullopt;
  return next;
}

void Forecast::prepared(Window& window, Id id) {
  window.queue.push_back(id);
  want(id, 1);
}

void Forecast::forget(Window& window) {
  for (const Id id : window.queue) want(id, -1);
  window.queue.clear();
}

// In one place more of a queue, or in one less.
void Forecast::want(Id id, int more) {
  if (const auto known = outlooks_.find(id); known != outlooks_.end()) known->second.wanted += more;
}

void Forecast::forget_others(const Window* kept) {
  for (auto& [thread, window] : windows_) {
    if (&window != kept) forget(window);
  }
}

bool Forecast::wants(const Window& window, Id id) {
  return std::find(window.queue.begin(), window.queue.end(), id) != window.queue.end();
}

uint64_t Forecast::uses_until_done(const Window& window, Id id) const {
  const auto known = outlooks_.find(id);
  const uint32_t wanted = known != outlooks_.end() ? known->second.wanted : 0;
  if (wanted == 0 && known != outlooks_.end()) return 0;
  // From the last use on, until all that are wanted have been seen. Most weights have one. All
  // windows together want at least as many as this one has in its queue.
  uint64_t here = 0, last = 0;
  for (size_t i = window.queue.size(); i-- > 0;) {
    if (window.queue[i] != id) continue;
    if (here == 0) last = i + 1;
    if (++here >= wanted) return last;
  }
  return wanted > here ? kNotKnown : last;
}

}  // namespace distorch
