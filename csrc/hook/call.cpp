// SPDX-License-Identifier: Apache-2.0
#include "hook/call.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "device/device_donor.h"
#include "device/device_trace.h"
#include "device/devices.h"
#include "device/pinned.h"
#include "engine/ring.h"
#include "hook/sweep.h"

namespace distorch {
namespace {

// The bytes of its storage that a strided tensor can reach.
std::pair<uint64_t, uint64_t> extent(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return {0, 0};
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto item = static_cast<uint64_t>(tensor.itemsize());
  const uint64_t begin = static_cast<uint64_t>(tensor.storage_offset()) * item;
  return {begin, (static_cast<uint64_t>(last) + 1) * item - begin};
}

// Of the first sharded tensor in an argument; null: there is none.
const Handle* first_handle(const c10::IValue& value) {
  if (value.isTensor()) {
    return is_sharded(value.toTensor()) ? &handle_of(value.toTensor()) : nullptr;
  }
  if (!value.isList()) return nullptr;
  for (const c10::IValue& element : value.toListRef()) {
    if (const Handle* found = first_handle(element)) return found;
  }
  return nullptr;
}

bool same_geometry(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.storage_offset() == b.storage_offset();
}

}  // namespace

bool holds_sharded(const c10::IValue& value) { return first_handle(value) != nullptr; }

struct Call::Traced {
  Traced(const Handle& handle, const std::string& name) {
    if (handle.compute.is_cpu()) {
      host.emplace("compute cpu", name);
    } else {
      const c10::impl::VirtualGuardImpl guard(handle.compute.type());
      device.emplace(guard.getStream(handle.compute),
                     [&]() -> SpanText { return {"compute " + handle.compute.str(), name}; });
    }
  }
  std::optional<HostSpan> host;
  std::optional<DeviceSpan> device;
};

Call::Call() { sweep_operators(); }

void Call::begin_trace(const Handle& handle) {
  if (traced_ == nullptr) traced_ = std::make_unique<Traced>(handle, handle.weight->name());
}

Call::~Call() {
  traced_.reset();
  for (const Swapped& argument : swapped_) {
    if (!argument.writes || argument.committed) continue;
    Handle& handle = handle_of(argument.sharded);
    handle.weight->changed();
  }
  if (fetched_.empty() || fetched_.front().device.is_cpu()) return;
  Ring& ring = fetched_.front().weight->ring();
  swapped_.clear();
  try {
    ring.released();
  } catch (const std::exception&) {
    // Looking ahead failed: who wants those weights asks again, and is told.
  }
}

bool Call::can_run_again(const c10::OperatorHandle& op) const {
  const auto writes = [](const Swapped& argument) { return argument.writes; };
  return std::none_of(swapped_.begin(), swapped_.end(), writes) && !op.schema().is_mutable() &&
         !op.hasTag(at::Tag::nondeterministic_seeded);
}

bool Call::make_room(const c10::OperatorHandle* boxed) {
  // Nothing fetched: the ring has made room for that fetch already.
  if (fetched_.empty() || fetched_.front().device.is_cpu()) return false;
  starved_ = &fetched_.front().weight->ring();
  starved_->give_back();
  if (boxed != nullptr && !can_run_again(*boxed)) return false;
  traced_.reset();
  swapped_.clear();
  fetched_.clear();
  return true;
}

void Call::tell_that_room_was_made(c10::OutOfMemoryError& error) const {
  error.add_context(
      c10::str("distorch had given back the ", starved_->capacity(),
               " bytes that it keeps for weights on "
               "their way, and the operator was run again. Offload more, or use smaller batches"));
}

void Call::run_boxed(const c10::OperatorHandle& op, torch::jit::Stack& stack,
                     c10::function_ref<void()> kernel) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t below = stack.size() - schema.arguments().size();
  const auto once = [&] {
    if (starved_ != nullptr) {  // the first time has spoilt them
      stack.resize(below);
      stack.insert(stack.end(), arguments_.begin(), arguments_.end());
    }
    swap_arguments(schema, stack);
    kernel();
  };
  run(once, &op);
  commit();
  wrap_results(stack, schema.returns().size());
}

c10::Storage Call::memory_of(Handle& handle) {
  for (const Fetched& known : fetched_) {
    if (known.weight != handle.weight) continue;
    return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(known.memory));
  }
  at::RecordFunction profiled(at::RecordScope::USER_SCOPE);
  if (profiled.isActive()) profiled.before("distorch::fetch " + handle.weight->name());
  c10::Storage memory = fetch(handle);
  fetched_.push_back({handle.weight, memory.unsafeGetStorageImpl(), handle.compute});
  if (TraceLog::instance().active()) begin_trace(handle);
  return memory;
}

at::Tensor Call::real(const at::Tensor& tensor, bool writes) {
  if (!is_sharded(tensor)) return tensor;
  Handle& handle = handle_of(tensor);
  at::Tensor real = make_real(tensor, memory_of(handle), Likeness::kExact);
  const bool in_place =
      handle.in_place.memory().unsafeGetStorageImpl() == real.storage().unsafeGetStorageImpl();
  swapped_.push_back({tensor, real, writes, in_place, false});
  return real;
}

at::Tensor Call::read_only(const at::Tensor& tensor, Likeness likeness) {
  return is_sharded(tensor) ? make_real(tensor, memory_of(handle_of(tensor)), likeness) : tensor;
}

void Call::swap_arguments(const c10::FunctionSchema& schema, torch::jit::Stack& stack) {
  const auto& arguments = schema.arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Handle* handle = first_handle(stack[first + i]);
    if (handle == nullptr) continue;
    if (arguments_.empty() && !handle->compute.is_cpu()) {
      arguments_.assign(stack.begin() + static_cast<std::ptrdiff_t>(first), stack.end());
    }
    const auto* alias = arguments[i].alias_info();
    swap(stack[first + i], alias != nullptr && alias->isWrite());
  }
}

void Call::swap(c10::IValue& value, bool writes) {
  if (value.isTensor()) {
    value = real(value.toTensor(), writes);
    return;
  }
  if (first_handle(value) == nullptr) return;
  c10::List<c10::IValue> list = value.toList().copy();
  for (size_t i = 0; i < list.size(); ++i) {
    c10::IValue element = list.get(i);
    swap(element, writes);
    list.set(i, std::move(element));
  }
  value = std::move(list);
}

void Call::commit() {
  for (Swapped& argument : swapped_) {
    if (argument.writes) commit(argument);
  }
}

void Call::commit(Swapped& argument) {
  Handle& handle = handle_of(argument.sharded);
  const c10::Storage& memory = argument.real.storage();
  const uint64_t total = memory.nbytes();
  if (!argument.in_place) {
    std::shared_ptr<HostBuffer> brought;
    if (!memory.device().is_cpu()) brought = bring_back(memory);
    const auto* bytes = brought ? brought->data : static_cast<const std::byte*>(memory.data());
    const auto [begin, length] = extent(argument.real);
    handle.weight->store(bytes, total, begin, length);
    moved(handle, bytes);
  } else if (memory.device().is_cpu() && memory.data() != handle.weight->donor()->host()) {
    // An out= argument grew: its new memory is the donor now.
    handle.weight->move_to({std::make_shared<StorageDonor>(memory), nullptr});
    moved(handle);
  }
  argument.sharded.storage().set_nbytes(static_cast<int64_t>(total));
  if (!same_geometry(argument.sharded, argument.real)) {
    argument.sharded.unsafeGetTensorImpl()->set_sizes_and_strides(
        argument.real.sizes(), argument.real.strides(), argument.real.storage_offset());
  }
  argument.committed = true;
}

void Call::wrap_results(torch::jit::Stack& stack, size_t count) {
  for (size_t i = stack.size() - count; i < stack.size(); ++i) wrap(stack[i]);
}

void Call::wrap(c10::IValue& value) const {
  if (value.isTensor()) {
    value = wrapped(value.toTensor());
    return;
  }
  if (!value.isList()) return;
  const auto elements = value.toListRef();
  if (elements.empty() || !elements[0].isTensor()) return;
  c10::List<c10::IValue> list = value.toList();
  for (size_t i = 0; i < list.size(); ++i) {
    c10::IValue element = list.get(i);
    wrap(element);
    list.set(i, std::move(element));
  }
}

at::Tensor Call::wrapped(const at::Tensor& result) const {
  if (!result.defined() || !result.has_storage()) return result;
  for (const Swapped& argument : swapped_) {
    if (result.is_same(argument.real)) return argument.sharded;
  }
  for (const Swapped& argument : swapped_) {
    if (!result.is_alias_of(argument.real)) continue;
    return make_sharded_like(argument.sharded, result);
  }
  return result;
}

}  // namespace distorch
