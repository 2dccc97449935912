// SPDX-License-Identifier: Apache-2.0
#include "rehearsal/rehearsal.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <utility>

#include "core/virtual_reads.h"
#include "engine/host_transfer.h"
#include "engine/ring.h"
#include "rehearsal/rehearsed_device.h"
#include "rehearsal/rehearsed_weight.h"
#include "rehearsal/stage.h"

namespace distorch {
namespace {

// Steps to learn the order of weights, and at the end those whose end the host waits for: some to
// settle, and six that count, since some take turns by two or three.
constexpr int kLearning = 3, kSettling = 3, kWaited = 6;
// Uses that are played until a step has settled, and then those that count.
constexpr size_t kSettlingUses = 8000, kCountedUses = 3000;
constexpr size_t kBriefUses = 300;  // of each kind, if the rehearsal is to be brief

// The host computes: reads go on while it does, and it stands still while it waits for one.
class RehearsedHost : public HostTransfer {
 public:
  explicit RehearsedHost(Stage& stage) : stage_(stage) {}

  std::shared_ptr<std::byte> allocate(uint64_t bytes) override { return stage_.no_memory(bytes); }
  bool in_use(const Slot& slot) const override { return slot.wrapped.use_count() > 1; }

  // What weights took to decode, since the last call.
  std::vector<TraceSpan> take_decodes() { return std::exchange(decodes_, {}); }

 protected:
  std::shared_ptr<void> wrap(std::byte*, uint64_t, std::shared_ptr<void> block) override {
    // A holder of its own for each slot: in_use() counts them.
    return std::make_shared<std::shared_ptr<void>>(std::move(block));
  }
  void decode_all(const Decoder& decoder, const std::byte*, std::byte*) override {
    const auto& known = static_cast<const RehearsedDecoder&>(decoder);
    const Time start = stage_.time().host();
    stage_.time().host_works(known.seconds());
    decodes_.push_back(
        {"decodes", known.name(), start, stage_.time().host(), known.stored_bytes()});
  }

 private:
  Stage& stage_;
  std::vector<TraceSpan> decodes_;
};

// The amount of a link's or a disk's work is in bytes.
uint64_t bytes_of(const VirtualSpan& span, const std::string& track) {
  const bool travels = track.starts_with("copies") || track == "reads";
  return travels && span.resource != "compute" ? static_cast<uint64_t>(span.amount) : 0;
}

class Play {
 public:
  explicit Play(const Script& script);
  Rehearsal run();

 private:
  MarkPtr step();
  void use(const Script::Use& use);
  void forget_spans();
  void collect_stalls();
  void add_up(Time begin, Time end, double steps, Rehearsal& result);
  std::vector<TraceSpan> spans_between(Time begin, Time end);

  const Script& script_;
  Stage stage_;
  RehearsedDevice* device_ = nullptr;  // of the ring; null: the host computes
  RehearsedHost* host_ = nullptr;      // the other one
  std::shared_ptr<Ring> ring_;
  const std::shared_ptr<Counters> counters_ = Counters::make();
  std::vector<std::unique_ptr<Weight>> weights_;
  std::vector<TraceSpan> own_spans_;  // stalls, and what the host did itself
};

Play::Play(const Script& script) : script_(script), stage_(script) {
  std::unique_ptr<Transfer> transfer;
  if (script.host_computes) {
    transfer.reset(host_ = new RehearsedHost(stage_));
  } else {
    transfer.reset(device_ = new RehearsedDevice(stage_));
  }
  ring_ = std::make_shared<Ring>(std::move(transfer), std::make_unique<VirtualReads>(stage_));
  for (const Script::Weight& weight : script.weights) {
    if (weight.pieces.empty()) throw std::invalid_argument(weight.name + " lies nowhere");
    for (const Script::Piece& piece : weight.pieces) {
      // What readers bring to host memory is copied from there.
      if (!script.host_computes) stage_.check_link(piece.place == "disk" ? "cpu" : piece.place);
    }
    Source source;
    const bool in_memory = script.host_computes && weight.pieces.front().place != "disk";
    source.donor = std::make_shared<RehearsedDonor>(
        weight.pieces, in_memory ? stage_.no_memory(weight.bytes) : nullptr);
    if (weight.encoded) source.decoder = std::make_shared<RehearsedDecoder>(weight);
    weights_.push_back(std::make_unique<Weight>(weight.name, std::move(source), ring_, counters_));
  }
  for (size_t i = 0; i < weights_.size(); ++i) {
    ring_->suggest(*weights_[i], weights_[(i + 1) % weights_.size()]->id());
  }
  for (const Script::Use& use : script.uses) {
    if (use.operators == 0) throw std::invalid_argument("a use of no operator");
    for (const uint32_t index : use.weights) {
      if (index >= weights_.size())
        throw std::invalid_argument("a use of a weight that is not there");
    }
  }
  ring_->reserve(script.ring_bytes);  // as long as the ring lives
}

// As Call does in the hook: all weights of an operator are held until it was issued.
void Play::use(const Script::Use& use) {
  const bool on_host = script_.host_computes;
  VirtualTime& time = stage_.time();
  const std::string name =
      use.weights.empty() ? "without a weight" : weights_[use.weights.front()]->name();
  std::vector<std::shared_ptr<void>> held;
  for (const uint32_t index : use.weights) {
    const Time start = time.host();
    held.push_back(ring_->acquire(*weights_[index]));
    if (!on_host) continue;
    Time decoding = 0;
    for (TraceSpan& span : host_->take_decodes()) {
      decoding += span.end - span.start;
      own_spans_.push_back(std::move(span));
    }
    own_spans_.push_back({"stalls", weights_[index]->name(), start, time.host() - decoding, 0});
  }
  if (on_host) {
    const Time start = time.host();
    time.host_works(use.seconds);
    own_spans_.push_back({"compute cpu", name, start, time.host(), 0});
    return;
  }
  if (use.copied > 0) {
    stage_.copy(stage_.compute_stream(), "the model's own", "cpu", use.copied);
  } else {
    stage_.compute(name, use.seconds, use.operators);
  }
  const bool fetched = !held.empty();
  held.clear();
  if (fetched) ring_->released();
  if (use.host_waits) time.await(stage_.record(stage_.compute_stream()));
}

// Plays all uses. The mark is reached when the last operator has ended.
MarkPtr Play::step() {
  for (const Script::Use& each : script_.uses) use(each);
  const auto end = std::make_shared<Mark>();
  stage_.time().record(stage_.compute_stream(), end);
  if (script_.host_computes) stage_.time().play_to_host();  // the host's time is the step's
  return end;
}

Rehearsal Play::run() {
  Rehearsal result;
  for (int i = 0; i < kLearning; ++i) {
    const MarkPtr end = step();
    stage_.time().await(end);
    if (i == 0) result.first = end->time;
  }
  forget_spans();
  // From here on the host is ahead of the device, if it can be. Steps of few operators are played
  // more often. Some settle late, after dozens of steps, or take turns.
  const size_t uses = std::max<size_t>(script_.uses.size(), 1);
  const bool brief = script_.brief;
  const size_t few = std::clamp<size_t>(kBriefUses / uses, 3, 24);
  const size_t settling = brief ? few : std::clamp<size_t>(kSettlingUses / uses, 5, 120);
  const size_t counted = brief ? few : std::clamp<size_t>(kCountedUses / uses, 5, 24);
  std::vector<MarkPtr> ends;
  for (size_t i = 0; i < settling; ++i) ends.push_back(step());
  const uint64_t before = counters_->overflows;
  for (size_t i = 0; i < counted; ++i) ends.push_back(step());
  const auto overflows = static_cast<double>(counters_->overflows - before);
  stage_.time().await(ends.back());
  Time start = 0;
  for (int i = 0; i < kSettling + kWaited && script_.waits; ++i) {
    if (i == kSettling) start = stage_.time().host();
    stage_.time().await(step());
  }
  if (script_.waits) result.waited = (stage_.time().host() - start) / kWaited;
  collect_stalls();
  const Time begin = ends[settling - 1]->time, end = ends.back()->time;
  const auto steps = static_cast<double>(counted);
  result.step = (end - begin) / steps;
  result.overflows = overflows / steps;
  add_up(begin, end, steps, result);
  result.spans = spans_between(ends[ends.size() - 2]->time, end);
  return result;
}

// Stalls and traffic of the counted steps.
void Play::add_up(Time begin, Time end, double steps, Rehearsal& result) {
  std::vector<TraceSpan> spans = spans_between(begin, end);
  std::sort(spans.begin(), spans.end(),
            [](const TraceSpan& a, const TraceSpan& b) { return a.start < b.start; });
  std::map<std::string, Time> busy_until;
  for (const TraceSpan& span : spans) {
    Rehearsal::Traffic& traffic = result.traffic[span.track];
    Time& until = busy_until[span.track];
    traffic.busy += std::max(0.0, span.end - std::max(span.start, until)) / steps;
    until = std::max(until, span.end);
    traffic.bytes += static_cast<double>(span.bytes) / steps;
    if (span.track.starts_with("stalls")) {
      result.stalls[span.name] += (span.end - span.start) / steps;
    }
  }
}

// Of what was played until now.
void Play::forget_spans() {
  stage_.time().spans().clear();
  own_spans_.clear();
  if (device_ != nullptr) device_->take_stalls();
}

void Play::collect_stalls() {
  if (device_ == nullptr) return;
  for (const RehearsedDevice::Stall& stall : device_->take_stalls()) {
    Time arrived = stall.needed->time;
    for (const MarkPtr& mark : stall.arrived) arrived = std::max(arrived, mark->time);
    own_spans_.push_back(
        {"stalls " + script_.compute, stall.weight, stall.needed->time, arrived, 0});
  }
}

// What of it happened in between, counted from `begin`.
std::vector<TraceSpan> Play::spans_between(Time begin, Time end) {
  std::vector<TraceSpan> found;
  const auto add = [&](TraceSpan span) {
    const Time length = span.end - span.start;
    const Time start = std::max(span.start, begin), until = std::min(span.end, end);
    if (until <= start) return;
    const auto until_then = [&](Time then) {
      return std::llround(static_cast<double>(span.bytes) * (then - span.start) / length);
    };
    span.bytes = static_cast<uint64_t>(until_then(until) - until_then(start));
    span.start = start - begin;
    span.end = until - begin;
    found.push_back(std::move(span));
  };
  for (const VirtualSpan& span : stage_.time().spans()) {
    const std::string& track = stage_.track_of(span.stream);
    add({track, span.label, span.start, span.end, bytes_of(span, track)});
  }
  for (const TraceSpan& span : own_spans_) add(span);
  return found;
}

}  // namespace

Rehearsal rehearse(const Script& script) {
  const TraceLog::Quiet quiet;
  return Play(script).run();
}

}  // namespace distorch
