// SPDX-License-Identifier: Apache-2.0
#include "device/device_donor.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <map>
#include <utility>

#include "core/mutex.h"
#include "device/storages.h"

namespace distorch {
namespace {

struct Peers {
  Mutex mutex;
  std::map<std::pair<std::string, std::string>, bool> known GUARDED_BY(mutex);
};

Peers& peers = *new Peers;

}  // namespace

DeviceDonor::DeviceDonor(c10::Storage storage) : storage_(std::move(storage)) {
  // From here on it is read on other streams than the one that filled it.
  const c10::impl::VirtualGuardImpl guard(storage_.device().type());
  guard.synchronizeStream(guard.getStream(storage_.device()));
}

std::string DeviceDonor::tier() const { return storage_.device().str(); }

std::vector<Extent> DeviceDonor::extents() const {
  return {{0, size(), tier(), static_cast<const std::byte*>(storage_.data()),
           storage_.unsafeGetStorageImpl(), &pending_}};
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
  pending_.wait();
  auto* data = static_cast<std::byte*>(storage_.mutable_data());
  copy_bytes(bytes_at(from, bytes, c10::Device(c10::kCPU)),
             bytes_at(data + begin, bytes, storage_.device()), false);
}

std::shared_ptr<std::byte> DeviceDonor::map() {
  std::shared_ptr<std::byte> copy(new std::byte[size()], std::default_delete<std::byte[]>());
  read(0, size(), copy.get(), false);
  return copy;
}

c10::Storage in_place_memory(const Source& source, c10::Device compute) {
  if (source.decoder != nullptr) return {};
  if (const auto* device = dynamic_cast<const DeviceDonor*>(source.donor.get())) {
    return device->storage().device() == compute ? device->storage() : c10::Storage();
  }
  const auto* host = dynamic_cast<const StorageDonor*>(source.donor.get());
  return host != nullptr && compute.is_cpu() ? host->storage() : c10::Storage();
}

void set_peer_access(const std::string& to, const std::string& from, bool possible) {
  const MutexLock lock(peers.mutex);
  peers.known[{to, from}] = possible;
}

bool can_reach(const std::string& to, const std::string& from) {
  const MutexLock lock(peers.mutex);
  const auto found = peers.known.find({to, from});
  return found == peers.known.end() || found->second;
}

}  // namespace distorch
