// SPDX-License-Identifier: Apache-2.0
#include "engine/trace_log.h"

#include <utility>

#include "core/mutex.h"

namespace distorch {

namespace {

// Never destroyed: threads may end after every static object.
TraceLog& log = *new TraceLog;

}  // namespace

TraceLog& TraceLog::instance() { return log; }

void TraceLog::start() {
  const MutexLock lock(mutex_);
  spans_.clear();
  pending_.clear();
  begin_ = std::chrono::steady_clock::now();
  active_ = true;
}

std::vector<TraceSpan> TraceLog::stop() {
  active_ = false;
  std::vector<std::function<TraceSpan()>> pending;
  std::vector<TraceSpan> spans;
  {
    const MutexLock lock(mutex_);
    pending = std::exchange(pending_, {});
    spans = std::exchange(spans_, {});
  }
  for (const auto& resolve : pending) spans.push_back(resolve());
  return spans;
}

double TraceLog::now() const {
  const MutexLock lock(mutex_);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
}

void TraceLog::add(TraceSpan span) {
  const MutexLock lock(mutex_);
  if (active()) spans_.push_back(std::move(span));
}

void TraceLog::add_later(std::function<TraceSpan()> resolve) {
  const MutexLock lock(mutex_);
  if (active()) pending_.push_back(std::move(resolve));
}

}  // namespace distorch
