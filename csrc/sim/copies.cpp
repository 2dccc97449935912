// SPDX-License-Identifier: Apache-2.0
#include "sim/copies.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "sim/call.h"

namespace distorch::sim {
namespace {

std::byte* bytes_of(const at::Tensor& tensor) {
  const auto offset = tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
  return real_bytes(tensor.storage().data()) + offset;
}

size_t bytes_in(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.itemsize();
}

// Both are one piece of memory with the elements in the same order.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && a.is_non_overlapping_and_dense() &&
         a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
}

Access whole(const at::Tensor& tensor, bool writes) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.storage().data()) +
                     static_cast<uintptr_t>(tensor.storage_offset()) * tensor.itemsize();
  return {begin, begin + bytes_in(tensor), writes};
}

// One trip over a link; `from` and `to` are real addresses.
Task trip(int link, const std::string& label, const std::byte* from, std::byte* to, size_t bytes) {
  Task task;
  task.label = label;
  task.resource = link;
  task.amount = static_cast<double>(bytes);
  if (mode() == Mode::kDeferred) task.start = [to, bytes] { poison(to, bytes); };
  if (mode() == Mode::kDeferred) task.end = [=] { std::memcpy(to, from, bytes); };
  if (mode() == Mode::kEager) std::memcpy(to, from, bytes);
  return task;
}

int link_between(int from, int to) {
  const int link = machine().link(from, to);
  TORCH_CHECK(link >= 0, "sim: there is no link from ", from, " to ", to, " (-1 is the host)");
  return link;
}

void check_fault() {
  try {
    machine().check_copy();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
}

std::string place(const at::Tensor& tensor) {
  return tensor.device().is_cpu() ? "cpu" : tensor.device().str();
}

std::string label_of(const at::Tensor& from, const at::Tensor& to) {
  return "copy " + std::to_string(bytes_in(to)) + " bytes " + place(from) + "->" + place(to);
}

// Host memory and one device, same layout.
void copy_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool up = on_sim(to);
  const at::Tensor& device = up ? to : from;
  const at::Tensor& host = up ? from : to;
  const int index = device.device().index();
  const bool pinned = is_pinned(host.storage().data());
  const int link = up ? link_between(kHost, index) : link_between(index, kHost);
  Task task = trip(link, label_of(from, to), bytes_of(from), bytes_of(to), bytes_in(to));
  task.accesses.push_back(whole(device, up));
  if (pinned) task.accesses.push_back(whole(host, !up));
  const int stream = current_stream(device.device().index());
  machine().issue(stream, std::move(task));
  if (!pinned || !non_blocking) return machine().synchronize_stream(stream);
  // The engine's own tensors own nothing, and are not PyTorch's to keep.
  const c10::DataPtr& owned = host.storage().data_ptr();
  if (owned.get_deleter() != nullptr) keep_pinned_until(owned.get(), machine().record(stream, 0));
}

// Two devices, same layout: on the source's stream, between what both had to
// do before and what they do afterwards.
void copy_peer(const at::Tensor& from, const at::Tensor& to) {
  const int source = from.device().index(), target = to.device().index();
  const int there = current_stream(from.device().index());
  const int here = current_stream(to.device().index());
  machine().wait(there, machine().record(here));
  const size_t bytes = bytes_in(to);
  const int direct = machine().link(source, target);
  if (direct >= 0) {
    Task task = trip(direct, label_of(from, to), bytes_of(from), bytes_of(to), bytes);
    task.accesses = {whole(from, false), whole(to, true)};
    machine().issue(there, std::move(task));
    machine().wait(here, machine().record(there));
    return;
  }
  auto staging = std::make_shared<std::vector<std::byte>>(mode() == Mode::kDry ? 0 : bytes);
  Task down =
      trip(link_between(source, kHost), label_of(from, to), bytes_of(from), staging->data(), bytes);
  down.accesses = {whole(from, false)};
  machine().issue(there, std::move(down));
  machine().wait(here, machine().record(there));
  Task up =
      trip(link_between(kHost, target), label_of(from, to), staging->data(), bytes_of(to), bytes);
  up.accesses = {whole(to, true)};
  up.end = [end = std::move(up.end), staging] {
    if (end) end();
  };
  machine().issue(here, std::move(up));
}

void copy_within(const at::Tensor& from, const at::Tensor& to) {
  static const auto copy = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  torch::jit::Stack stack{to, from, false};
  call_on_device(copy, copy, &stack);
}

at::Tensor dense_copy(const at::Tensor& from, const at::Tensor& like) {
  const at::Tensor made =
      empty_on(at::empty(like.sizes(), at::TensorOptions().dtype(like.dtype()).device(at::kMeta)),
               from.device());
  copy_within(from, made);
  return made;
}

}  // namespace

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
  if (destination.numel() == 0) return destination;
  for (const at::Tensor* tensor : {&self, &destination}) {
    if (on_sim(*tensor)) check_alive(tensor->device().index());
  }
  const at::Tensor from = self.sizes() == destination.sizes() ? self : self.expand_as(destination);
  if (on_sim(from) && from.device() == destination.device()) {
    copy_within(from, destination);
    return destination;
  }
  check_fault();
  const bool peers = on_sim(from) && on_sim(destination);
  if (same_layout(from, destination)) {
    peers ? copy_peer(from, destination) : copy_host(from, destination, non_blocking);
    return destination;
  }
  const PlainDispatch plain;
  if (on_sim(destination)) {
    const at::Tensor dense =
        peers ? dense_copy(from, destination)
              : from.to(destination.scalar_type()).contiguous().resolve_conj().resolve_neg();
    const at::Tensor here = empty_on(dense, destination.device());
    peers ? copy_peer(dense, here) : copy_host(dense, here, false);
    copy_within(here, destination);
    return destination;
  }
  const at::Tensor dense = dense_copy(from, destination);
  const at::Tensor host = at::empty(dense.sizes(), destination.options());
  copy_host(dense, host, false);
  destination.copy_(host);
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  destination.resize_(self.sizes());
  return copy_from(self, destination, false);
}

}  // namespace distorch::sim
