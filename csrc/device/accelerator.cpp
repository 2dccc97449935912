#include "device/accelerator.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <utility>

#include "device/cuda.h"
#include "device/device_trace.h"
#include "device/row_decoder.h"
#include "device/storages.h"

namespace distorch {
namespace {

constexpr uint64_t kBounceBytes = 2 << 20;
constexpr size_t kMostBehind = 4;    // staged weights of one size that wait for their copy
constexpr uint64_t kMergeGap = 512;  // padding between neighbours that is copied along

struct Peers {
  std::mutex mutex;
  std::map<std::pair<std::string, std::string>, bool> known;  // guarded by mutex
};

Peers& peers() {
  static Peers& instance = *new Peers;
  return instance;
}

bool can_reach(const std::string& to, const std::string& from) {
  std::lock_guard lock(peers().mutex);
  const auto found = peers().known.find({to, from});
  return found == peers().known.end() || found->second;
}

// PyTorch passes the question on since 2.13; before, the kernels' library does.
template <class Guard>
bool is_recording(const Guard& guard, const c10::Stream& stream) {
  if constexpr (requires { guard.isStreamCapturing(stream); }) {
    return guard.isStreamCapturing(stream);
  } else {
    const cuda::Kernels* kernels = stream.device().is_cuda() ? cuda_kernels() : nullptr;
    if (kernels == nullptr) return false;
    const c10::OptionalDeviceGuard on_device{stream.device()};
    bool found = false;
    const int error = kernels->is_capturing(
        stream.device_index(), static_cast<CUstream_st*>(stream.native_handle()), &found);
    check_cuda(*kernels, error, "asking whether a graph is being captured");
    return found;
  }
}

void copy_bytes(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from, non_blocking);
}

// What is known of the bytes on their way to a slot.
struct Arrival {
  std::vector<std::shared_ptr<c10::Event>> events;
  std::vector<std::shared_ptr<c10::Event>> behind;  // users of the room, where readers bring
  std::vector<c10::StreamId> waited;                // streams that waited for them
  std::optional<Moment> asked;  // when an operator needed them, if the host waited
};

void fail(Slot& slot, const std::string& error) {
  slot.state = Slot::State::kFailed;
  slot.error = error;
}

Arrival& arrival_of(Slot& slot) {
  if (slot.arrival == nullptr) slot.arrival = std::make_shared<Arrival>();
  return *static_cast<Arrival*>(slot.arrival.get());
}

}  // namespace

// Pinned memory that readers fill, used again when its copies are done.
struct Accelerator::StagingPool {
  struct Buffer {
    at::Tensor bytes;
    std::shared_ptr<c10::Event> copied;  // null: it was never on its way
  };
  // One of about that size, whose copy is done; undefined: there is none. Where
  // the device is far behind with copying, waits for the oldest: its memory is
  // the host's to bound, for the device would let it run ahead without end.
  at::Tensor take(uint64_t bytes);

  std::mutex mutex;
  std::vector<Buffer> idle;  // the oldest copy first; guarded by mutex
};

at::Tensor Accelerator::StagingPool::take(uint64_t bytes) {
  std::lock_guard lock(mutex);
  auto oldest = idle.end();
  size_t behind = 0;
  for (auto known = idle.begin(); known != idle.end(); ++known) {
    const auto room = static_cast<uint64_t>(known->bytes.numel());
    if (room < bytes || room > 2 * bytes) continue;
    const bool done = known->copied == nullptr || known->copied->query();
    if (!done && ++behind == 1) oldest = known;
    if (!done && behind < kMostBehind) continue;
    const auto found = done ? known : oldest;
    if (!done) found->copied->synchronize();
    at::Tensor buffer = std::move(found->bytes);
    idle.erase(found);
    return buffer;
  }
  return {};
}

struct Accelerator::PinnedStaging : Staged {
  ~PinnedStaging() override {
    std::lock_guard lock(pool->mutex);
    pool->idle.push_back(std::move(buffer));
  }
  std::shared_ptr<StagingPool> pool;
  StagingPool::Buffer buffer;
};

Accelerator::Accelerator(c10::Device device)
    : device_(device), guard_(device.type()), staging_(std::make_shared<StagingPool>()) {}

std::shared_ptr<std::byte> Accelerator::allocate(uint64_t bytes) {
  const c10::OptionalDeviceGuard on{device_};
  auto storage = std::make_shared<c10::Storage>(
      c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes),
      c10::GetAllocator(device_.type())->allocate(bytes), nullptr, false);
  for (const auto& [place, link] : links_) {
    guard_.recordDataPtrOnStream(storage->data_ptr(), link.stream);
  }
  if (decoding_) guard_.recordDataPtrOnStream(storage->data_ptr(), *decoding_);
  for (const c10::Stream& user : users_) guard_.recordDataPtrOnStream(storage->data_ptr(), user);
  use_on(guard_.getStream(device_));  // copies follow what this memory was before
  std::erase_if(blocks_, [](const auto& block) { return block.expired(); });
  blocks_.push_back(storage);
  auto* data = static_cast<std::byte*>(storage->mutable_data());
  return {std::move(storage), data};
}

void Accelerator::use_on(const c10::Stream& stream) {
  if (std::find(users_.begin(), users_.end(), stream) != users_.end()) return;
  users_.push_back(stream);
  for (const auto& weak : blocks_) {
    if (const auto block = weak.lock()) guard_.recordDataPtrOnStream(block->data_ptr(), stream);
  }
}

std::shared_ptr<void> Accelerator::wrap(std::byte* data, uint64_t bytes,
                                        std::shared_ptr<void> block) {
  return slot_storage(data, bytes, std::move(block), device_);
}

bool Accelerator::in_use(const std::shared_ptr<void>& wrapped) const {
  return slot_in_use(wrapped);
}

bool Accelerator::recording() const {
  if (!knows_recording_) return false;
  try {
    return is_recording(guard_, guard_.getStream(device_));
  } catch (const c10::Error&) {
    knows_recording_ = false;
    return false;
  }
}

bool Accelerator::brings(const Donor& donor) const { return !donor.extents().empty(); }

std::shared_ptr<Staged> Accelerator::staging(uint64_t bytes) {
  auto staged = std::make_shared<PinnedStaging>();
  staged->pool = staging_;
  staged->buffer.bytes = staging_->take(bytes);
  at::Tensor& buffer = staged->buffer.bytes;
  if (!buffer.defined()) buffer = pinned_memory(bytes, device_);
  staged->data = static_cast<std::byte*>(buffer.mutable_data_ptr());
  return staged;
}

Accelerator::Link& Accelerator::link_from(const std::string& place) {
  const auto found = links_.find(place);
  if (found != links_.end()) return found->second;
  const c10::Device from(place);
  Link link{from, guard_.getNewStream(device_), std::nullopt, {}, {}, std::nullopt};
  if (!from.is_cpu()) {
    link.source = c10::impl::VirtualGuardImpl(from.type()).getNewStream(from);
    if (!can_reach(device_.str(), place)) {
      link.bounce =
          Bounce{{pinned_memory(kBounceBytes, device_), pinned_memory(kBounceBytes, device_)},
                 {c10::Event(device_.type()), c10::Event(device_.type())},
                 0};
    }
  }
  for (const auto& weak : blocks_) {
    if (const auto block = weak.lock()) {
      guard_.recordDataPtrOnStream(block->data_ptr(), link.stream);
    }
  }
  const auto behind = [&](const c10::Stream& earlier) {
    auto issued = std::make_shared<c10::Event>(device_.type());
    issued->record(earlier);
    link.orphans.push_back(std::move(issued));
  };
  // Orphans from before this link was there.
  for (const auto& [other, earlier] : links_) behind(earlier.stream);
  if (decoding_) behind(*decoding_);
  return links_.emplace(place, std::move(link)).first->second;
}

void Accelerator::bring(const std::shared_ptr<Slot>& slot, const Donor& donor, Range part) {
  if (slot->decoder != nullptr) to_decode_.push_back(slot);
  std::vector<Extent> extents = donor.extents();
  if (slot->staged != nullptr) {
    extents = {{0, donor.size(), "cpu", slot->staged_data, slot->staged.get()}};
  }
  for (Extent extent : extents) {
    const uint64_t from = std::max(part.begin, extent.begin);
    const uint64_t to_end = std::min(part.end, extent.begin + extent.bytes);
    if (from > to_end || (from == to_end && extent.bytes > 0)) continue;
    extent.data += from - extent.begin;
    extent.begin = from;
    extent.bytes = to_end - from;
    std::vector<Copy>& waiting = link_from(extent.place).waiting;
    std::byte* to = slot->landing() + extent.begin;
    if (!waiting.empty()) {
      Copy& last = waiting.back();
      const auto gap = static_cast<uint64_t>(to - (last.to + last.bytes));
      if (last.owner == extent.owner && to >= last.to + last.bytes && gap < kMergeGap &&
          extent.data == last.from + last.bytes + gap) {
        last.bytes += gap + extent.bytes;
        last.slots.push_back(slot);
        continue;
      }
    }
    waiting.push_back({extent.data, extent.owner, to, extent.bytes, {slot}});
  }
}

void Accelerator::wait_for_users(const c10::Stream& stream) {
  for (const c10::Stream& user : users_) {
    c10::Event issued(device_.type());
    issued.record(user);
    issued.block(stream);
  }
}

void Accelerator::took(Slot& slot) {
  std::vector<std::shared_ptr<c10::Event>> events;
  for (const c10::Stream& user : users_) {
    events.push_back(std::make_shared<c10::Event>(device_.type()));
    events.back()->record(user);
  }
  arrival_of(slot).behind = std::move(events);  // later ones on the same streams
}

void Accelerator::flush(std::vector<std::shared_ptr<Slot>>* failed) {
  for (auto& [place, link] : links_) {
    if (link.waiting.empty()) continue;
    const std::vector<Copy> copies = std::exchange(link.waiting, {});
    std::string error;
    try {
      const auto is_read = [](const Copy& copy) { return copy.slots.front()->staged != nullptr; };
      if (!std::all_of(copies.begin(), copies.end(), is_read)) wait_for_users(link.stream);
      for (const auto& orphan : std::exchange(link.orphans, {})) orphan->block(link.stream);
    } catch (const c10::Error& refused) {
      error = refused.what_without_backtrace();
    }
    for (const Copy& copy : copies) {
      if (error.empty() && issue(link, copy)) continue;
      for (const auto& slot : copy.slots) {
        if (!error.empty()) fail(*slot, error);
        failed->push_back(slot);
      }
    }
  }
  for (const auto& slot : std::exchange(to_decode_, {})) {
    if (slot->weight == nullptr || slot->state != Slot::State::kReady) continue;
    try {
      decode(slot);
    } catch (const std::exception& refused) {
      fail(*slot, refused.what());
      failed->push_back(slot);
    }
  }
}

c10::Stream& Accelerator::decoding_stream() {
  if (!decoding_) {
    decoding_ = guard_.getNewStream(device_);
    for (const auto& weak : blocks_) {
      if (const auto block = weak.lock()) {
        guard_.recordDataPtrOnStream(block->data_ptr(), *decoding_);
      }
    }
  }
  return *decoding_;
}

// Behind the copies of a slot, and behind whatever used its room before.
void Accelerator::decode(const std::shared_ptr<Slot>& slot) {
  const c10::Stream& stream = decoding_stream();
  const auto& decoder = static_cast<const RowDecoder&>(*slot->decoder);
  Arrival& arrival = arrival_of(*slot);
  wait_for_users(stream);
  for (const auto& event : arrival.events) event->block(stream);
  const DeviceSpan span(stream, "decodes " + device_.str(), slot->weight->name(),
                        decoder.stored_bytes());
  {
    const c10::OptionalDeviceGuard on_device{device_};
    const c10::StreamGuard on_stream(stream);
    decoder.decode_on_device(bytes_at(slot->landing(), decoder.stored_bytes(), device_),
                             bytes_at(slot->data, decoder.decoded_bytes(), device_), stream);
  }
  auto decoded = std::make_shared<c10::Event>(device_.type());
  decoded->record(stream);
  arrival.events = {std::move(decoded)};
}

// False: the device refused; the slots have the error.
bool Accelerator::issue(Link& link, const Copy& copy) {
  const auto was_dropped = [](const auto& slot) { return slot->weight == nullptr; };
  if (std::all_of(copy.slots.begin(), copy.slots.end(), was_dropped)) return true;
  std::string error;
  std::optional<DeviceSpan> span;
  if (TraceLog::instance().active()) {
    const Weight* weight = copy.slots.front()->weight;
    const std::string more =
        copy.slots.size() > 1 ? " and " + std::to_string(copy.slots.size() - 1) + " more" : "";
    span.emplace(link.stream, "copies " + link.from.str() + "->" + device_.str(),
                 (weight != nullptr ? weight->name() : "") + more, copy.bytes);
  }
  try {
    for (const auto& slot : copy.slots) {
      for (const auto& used : arrival_of(*slot).behind) used->block(link.stream);
    }
    if (link.bounce) {
      bounce(link, copy);
    } else {
      const at::Tensor from = bytes_at(copy.from, copy.bytes, link.from);
      const at::Tensor to = bytes_at(copy.to, copy.bytes, device_);
      const c10::OptionalStreamGuard on_source(link.source);
      const c10::StreamGuard on_target(link.stream);
      copy_bytes(from, to, true);
    }
  } catch (const c10::Error& refused) {
    error = refused.what_without_backtrace();
  }
  span.reset();
  auto arrived = std::make_shared<c10::Event>(device_.type());
  try {
    arrived->record(link.stream);  // of a part, if there was an error
  } catch (const c10::Error& refused) {
    error = refused.what_without_backtrace();
  }
  for (const auto& slot : copy.slots) {
    if (was_dropped(slot)) add_orphan(arrived);
    arrival_of(*slot).events.push_back(arrived);
    if (!error.empty()) {
      fail(*slot, error);
      continue;
    }
    if (slot->state == Slot::State::kLoading && slot->whole()) slot->state = Slot::State::kReady;
    if (slot->staged != nullptr) {
      static_cast<PinnedStaging&>(*slot->staged).buffer.copied = arrived;
      slot->staged.reset();
    }
  }
  if (!link.from.is_cpu() && link.source) {  // the donor may go before the copy has ended
    const auto* owner = static_cast<const c10::StorageImpl*>(copy.owner);
    c10::impl::VirtualGuardImpl(link.from.type())
        .recordDataPtrOnStream(owner->data_ptr(),
                               link.from == device_ ? link.stream : *link.source);
  }
  return error.empty();
}

// Through two buffers in turn, so that both ways are busy at once.
void Accelerator::bounce(Link& link, const Copy& copy) {
  Bounce& through = *link.bounce;
  for (uint64_t begin = 0; begin < copy.bytes; begin += kBounceBytes) {
    const uint64_t bytes = std::min(kBounceBytes, copy.bytes - begin);
    const size_t turn = through.next++ % 2;
    const at::Tensor buffer = through.buffer[turn].narrow(0, 0, static_cast<int64_t>(bytes));
    c10::Event down(link.from.type());
    through.free[turn].block(*link.source);
    {
      const c10::StreamGuard on_source(*link.source);
      copy_bytes(bytes_at(copy.from + begin, bytes, link.from), buffer, true);
      down.record(*link.source);
    }
    const c10::StreamGuard on_target(link.stream);
    down.block(link.stream);
    copy_bytes(buffer, bytes_at(copy.to + begin, bytes, device_), true);
    through.free[turn].record(link.stream);
  }
}

void Accelerator::dropped(Slot& slot) {
  if (slot.arrival == nullptr) return;
  const Arrival& arrival = arrival_of(slot);
  if (!arrival.waited.empty()) return;
  for (const auto& event : arrival.events) add_orphan(event);
}

void Accelerator::add_orphan(const std::shared_ptr<c10::Event>& copied) {
  for (auto& [place, link] : links_) link.orphans.push_back(copied);
}

bool Accelerator::waits(Slot& slot) {
  Arrival& arrival = arrival_of(slot);
  if (!arrival.asked) arrival.asked.emplace(guard_.getStream(device_));
  return true;
}

// See Note [How long a stream waits].
void Accelerator::lend(Slot& slot, Counters& counters) {
  const c10::Stream stream = guard_.getStream(device_);
  use_on(stream);
  if (slot.arrival == nullptr) return;
  Arrival& arrival = arrival_of(slot);
  if (std::find(arrival.waited.begin(), arrival.waited.end(), stream.id()) !=
      arrival.waited.end()) {
    return;
  }
  const DeviceSpan span(stream, "stalls " + device_.str(),
                        slot.weight != nullptr ? slot.weight->name() : "");
  Moment needed = arrival.asked && arrival.asked->stream == stream
                      ? *std::exchange(arrival.asked, std::nullopt)
                      : Moment(stream);
  for (const auto& event : arrival.events) event->block(stream);
  arrival.waited.push_back(stream.id());
  counters.stalls(std::make_unique<DeviceTime>(std::move(needed), Moment(stream)));
}

// ---- donors ----------------------------------------------------------------

DeviceDonor::DeviceDonor(c10::Storage storage) : storage_(std::move(storage)) {
  // From here on it is read on other streams than the one that filled it.
  const c10::impl::VirtualGuardImpl guard(storage_.device().type());
  guard.synchronizeStream(guard.getStream(storage_.device()));
}

std::string DeviceDonor::tier() const { return storage_.device().str(); }

std::vector<Extent> DeviceDonor::extents() const {
  return {{0, size(), tier(), static_cast<const std::byte*>(storage_.data()),
           storage_.unsafeGetStorageImpl()}};
}

void DeviceDonor::read(uint64_t begin, uint64_t bytes, std::byte* into, bool) const {
  const auto* data = static_cast<const std::byte*>(storage_.data());
  copy_bytes(bytes_at(data + begin, bytes, storage_.device()),
             bytes_at(into, bytes, c10::Device(c10::kCPU)), false);
}

void DeviceDonor::gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const {
  const auto count = static_cast<int64_t>(rows.size());
  const auto width = static_cast<int64_t>(row_bytes);
  const c10::DeviceGuard on_device(storage_.device());
  const at::Tensor numbers = at::empty({count}, at::TensorOptions().dtype(at::kLong));
  std::copy(rows.begin(), rows.end(), numbers.mutable_data_ptr<int64_t>());
  at::AutoDispatchBelowADInplaceOrView below;
  const auto* data = static_cast<const std::byte*>(storage_.data());
  const at::Tensor all = bytes_at(data, size() / row_bytes * row_bytes, storage_.device());
  const at::Tensor found = all.view({-1, width}).index_select(0, numbers.to(storage_.device()));
  bytes_at(into, rows.size() * row_bytes, c10::Device(c10::kCPU)).copy_(found.view(-1));
}

void DeviceDonor::write(uint64_t begin, uint64_t bytes, const std::byte* from) {
  auto* data = static_cast<std::byte*>(storage_.mutable_data());
  copy_bytes(bytes_at(from, bytes, c10::Device(c10::kCPU)),
             bytes_at(data + begin, bytes, storage_.device()), false);
}

std::shared_ptr<std::byte> DeviceDonor::map() {
  std::shared_ptr<std::byte> copy(new std::byte[size()], std::default_delete<std::byte[]>());
  read(0, size(), copy.get(), false);
  return copy;
}

void set_peer_access(const std::string& to, const std::string& from, bool possible) {
  std::lock_guard lock(peers().mutex);
  peers().known[{to, from}] = possible;
}

}  // namespace distorch
