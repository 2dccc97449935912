// Every operator of the simulated device: the CPU's own kernels, at the right
// virtual time, over the device's bytes.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

#include "sim/device.h"
#include "sim/memory.h"

namespace distorch::sim {
namespace {

using torch::jit::Stack;

Machine& machine() { return Machine::instance(); }
Mode mode() { return machine().config().mode; }
bool on_sim(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

// Tensors over other memory, one storage for each storage they come from.
class Mirror {
 public:
  enum class Kind { kMeta, kBytes };
  explicit Mirror(Kind kind) : kind_(kind) {}

  at::Tensor of(const at::Tensor& tensor) {
    const c10::StorageImpl* known = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(known);
    if (found == storages_.end()) found = storages_.emplace(known, make_storage(tensor)).first;
    const auto key = kind_ == Kind::kMeta ? c10::DispatchKey::Meta : c10::DispatchKey::CPU;
    auto mirrored = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(key), tensor.dtype());
    c10::TensorImpl* impl = mirrored.unsafeGetTensorImpl();
    impl->set_storage_offset(tensor.storage_offset());
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    mirrored._set_conj(tensor.is_conj());
    mirrored._set_neg(tensor.is_neg());
    return mirrored;
  }

 private:
  c10::Storage make_storage(const at::Tensor& tensor) const {
    const size_t bytes = tensor.storage().nbytes();
    const bool meta = kind_ == Kind::kMeta;
    void* data = meta || bytes == 0 ? nullptr : real_bytes(tensor.storage().data());
    const c10::Device device(meta ? c10::kMeta : c10::kCPU);
    return c10::Storage(c10::Storage::use_byte_size_t(), bytes, at::DataPtr(data, device),
                        c10::GetAllocator(device.type()), /*resizable=*/meta);
  }

  const Kind kind_;
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_;
};

// The bytes of the device that a tensor can reach.
Access access_of(const at::Tensor& tensor, bool writes) {
  if (tensor.numel() == 0) return {0, 0, writes};
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto base = reinterpret_cast<uintptr_t>(tensor.storage().data());
  const auto item = static_cast<uintptr_t>(tensor.itemsize());
  return {base + static_cast<uintptr_t>(tensor.storage_offset()) * item,
          base + (static_cast<uintptr_t>(last) + 1) * item, writes};
}

// The state in which queued kernels run, whatever thread plays the queue.
class PlainDispatch {
  c10::impl::ForceDispatchKeyGuard guard_{
      c10::default_included_set,
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset};
};

at::Tensor empty_on(const at::Tensor& like_geometry, c10::Device device) {
  const c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      like_geometry.sizes(), like_geometry.strides(), c10::GetAllocator(kSim),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like_geometry.scalar_type());
}

template <class Visit>
void for_each_tensor(const c10::IValue& value, Visit&& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) for_each_tensor(element, visit);
  }
}

template <class Change>
c10::IValue changed(const c10::IValue& value, Change&& change) {
  if (value.isTensor()) {
    return value.toTensor().defined() ? c10::IValue(change(value.toTensor())) : value;
  }
  if (!value.isList()) return value;
  c10::List<c10::IValue> list = value.toList().copy();
  for (size_t i = 0; i < list.size(); ++i) list.set(i, changed(list.get(i), change));
  return list;
}

// Work in operations of floating point, for operators that are bound by it.
double flops_of(const std::string& name, const Stack& arguments) {
  const auto tensor = [&](size_t i) { return arguments.at(i).toTensor(); };
  const auto product = [](const at::Tensor& a, const at::Tensor& b) {
    return 2.0 * static_cast<double>(a.numel()) * static_cast<double>(b.size(-1));
  };
  if (name == "aten::mm" || name == "aten::bmm") return product(tensor(0), tensor(1));
  if (name == "aten::addmm" || name == "aten::baddbmm") return product(tensor(1), tensor(2));
  if (name == "aten::convolution_overrideable") {
    const at::Tensor input = tensor(0), weight = tensor(1);
    double outputs = static_cast<double>(input.size(0));
    const auto stride = arguments.at(3).toIntVector(), padding = arguments.at(4).toIntVector(),
               dilation = arguments.at(5).toIntVector();
    for (int64_t d = 2; d < input.dim(); ++d) {
      const size_t i = static_cast<size_t>(d - 2);
      const auto at = [&](const std::vector<int64_t>& v) { return v[std::min(i, v.size() - 1)]; };
      outputs *= static_cast<double>(
          (input.size(d) + 2 * at(padding) - at(dilation) * (weight.size(d) - 1) - 1) / at(stride) +
          1);
    }
    return 2.0 * static_cast<double>(weight.numel()) * outputs;
  }
  if (name == "aten::convolution_backward_overrideable") {
    return 4.0 * static_cast<double>(tensor(2).numel()) *
           static_cast<double>(tensor(0).numel() / std::max<int64_t>(tensor(0).size(1), 1));
  }
  return 0;
}

// One call of an operator with tensors of one simulated device.
class DeviceCall {
 public:
  // `run`: the operator that computes it, for names that only stand for another.
  DeviceCall(const c10::OperatorHandle& op, const c10::OperatorHandle& run, Stack* stack)
      : run_(run), name_(op.schema().name()), schema_(run.schema()), stack_(stack) {
    const auto all = torch::jit::last(*stack, op.schema().arguments().size());
    arguments_.assign(all.begin(), all.end());
    flops_ = flops_of(name_, arguments_);
    find_device();
  }
  Stack& arguments() { return arguments_; }

  void operator()(size_t given) {
    const c10::DeviceGuard guard(device_);
    check_alive(device_.index());
    if ((mode() == Mode::kDry || !shapes_need_values()) && prepare()) {
      issue(queued());
    } else {
      TORCH_CHECK(mode() != Mode::kDry, "sim: ", name_, " needs values, and a dry run has none");
      if (mode() == Mode::kDeferred) machine().synchronize_stream(current_stream(device_.index()));
      run_now();
      issue({});
    }
    torch::jit::drop(*stack_, given);
    for (c10::IValue& value : results_) stack_->push_back(std::move(value));
  }

 private:
  void find_device() {
    bool found = false;
    for (const c10::IValue& argument : arguments_) {
      for_each_tensor(argument, [&](const at::Tensor& tensor) {
        if (!on_sim(tensor)) return;
        TORCH_CHECK(!found || tensor.device() == device_, name_,
                    ": expected all tensors to be on the same device, found ", device_, " and ",
                    tensor.device());
        device_ = tensor.device();
        found = true;
      });
    }
    const bool indexes = name_.find("index") != std::string::npos;
    for (const c10::IValue& argument : arguments_) {
      for_each_tensor(argument, [&](const at::Tensor& tensor) {
        TORCH_CHECK(on_sim(tensor) || tensor.dim() == 0 || indexes, name_,
                    ": expected all tensors to be on the same device, found ", device_, " and ",
                    tensor.device());
      });
    }
    if (!found) device_ = c10::impl::VirtualGuardImpl(kSim).getDevice();
  }

  bool shapes_need_values() const {
    static const std::unordered_set<std::string> differ{"aten::native_batch_norm",
                                                        "aten::native_batch_norm_backward",
                                                        "aten::_embedding_bag",
                                                        "aten::_embedding_bag_forward_only",
                                                        "aten::histc",
                                                        "aten::histogram",
                                                        "aten::convolution_backward_overrideable"};
    return differ.count(name_) > 0 || run_.hasTag(at::Tag::nondeterministic_seeded) ||
           run_.hasTag(at::Tag::dynamic_output_shape) ||
           run_.hasTag(at::Tag::data_dependent_output);
  }

  Stack mirrored(Mirror& mirror, c10::DeviceType type) const {
    Stack made;
    for (const c10::IValue& argument : arguments_) {
      if (argument.isDevice() && argument.toDevice().type() == kSim) {
        made.emplace_back(c10::Device(type));
        continue;
      }
      made.push_back(changed(argument, [&](const at::Tensor& tensor) {
        if (on_sim(tensor)) return mirror.of(tensor);
        at::Tensor copy = tensor.detach().clone();
        if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
          copy.unsafeGetTensorImpl()->set_wrapped_number(true);
        }
        return copy;
      }));
    }
    return made;
  }

  // Results from the shapes that the meta kernels give. False: they cannot.
  bool prepare() {
    Mirror mirror(Mirror::Kind::kMeta);
    Stack shapes = mirrored(mirror, c10::kMeta);
    const Stack given = shapes;
    try {
      const PlainDispatch plain;
      run_.callBoxed(&shapes);
    } catch (const c10::Error&) {
      if (mode() == Mode::kDry) throw;
      return false;  // no meta kernel, or an error that the CPU's kernel will tell, too
    }
    for (size_t i = 0; i < given.size(); ++i) grow(arguments_[i], given[i]);
    for (const c10::IValue& shape : shapes) {
      results_.push_back(changed(shape, [&](const at::Tensor& meta) { return real(meta, given); }));
    }
    return true;
  }

  // An `out=` argument that the meta kernel resized.
  void grow(const c10::IValue& argument, const c10::IValue& shape) {
    if (!argument.isTensor() || !on_sim(argument.toTensor())) return;
    const at::Tensor tensor = argument.toTensor(), meta = shape.toTensor();
    if (tensor.sizes() == meta.sizes()) return;
    tensor.resize_(meta.sizes());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
  }

  at::Tensor real(const at::Tensor& meta, const Stack& given) {
    at::Tensor found;
    for (size_t i = 0; i < given.size(); ++i) match(meta, given[i], arguments_[i], &found);
    if (found.defined()) return found;
    const at::Tensor made = empty_on(meta, device_);
    fresh_.push_back(made);
    return made;
  }

  static void match(const at::Tensor& meta, const c10::IValue& given, const c10::IValue& argument,
                    at::Tensor* found) {
    if (given.isTensor()) {
      if (given.toTensor().is_same(meta)) *found = argument.toTensor();
    } else if (given.isList()) {
      for (size_t i = 0; i < given.toListRef().size(); ++i) {
        match(meta, given.toListRef()[i], argument.toListRef()[i], found);
      }
    }
  }

  // The CPU's kernel over the device's bytes, to be run later. It holds no
  // tensors of the user's: only addresses.
  std::function<void()> queued() {
    if (mode() == Mode::kDry) return {};
    Mirror mirror(Mirror::Kind::kBytes);
    Stack given = mirrored(mirror, c10::kCPU);
    std::vector<at::Tensor> into;
    for (const at::Tensor& tensor : fresh_) into.push_back(mirror.of(tensor));
    return [op = run_, given = std::move(given), into = std::move(into), name = name_] {
      const PlainDispatch plain;
      Stack stack = given;
      op.callBoxed(&stack);
      size_t next = 0;
      for (const c10::IValue& value : stack) {
        for_each_tensor(value, [&](const at::Tensor& made) {
          if (is_one_of(made, given)) return;
          TORCH_CHECK(next < into.size() && made.sizes() == into[next].sizes(), "sim: ", name,
                      " gave another shape on the CPU than on meta");
          into[next++].copy_(made);
        });
      }
    };
  }

  static bool is_one_of(const at::Tensor& tensor, const Stack& values) {
    bool found = false;
    for (const c10::IValue& value : values) {
      for_each_tensor(value, [&](const at::Tensor& known) { found |= known.is_same(tensor); });
    }
    return found;
  }

  void run_now() {
    Mirror mirror(Mirror::Kind::kBytes);
    Stack stack = mirrored(mirror, c10::kCPU);
    const Stack given = stack;
    {
      const PlainDispatch plain;
      run_.callBoxed(&stack);
    }
    for (const c10::IValue& value : stack) {
      results_.push_back(changed(value, [&](const at::Tensor& cpu) {
        at::Tensor found;
        for (size_t i = 0; i < given.size(); ++i) match(cpu, given[i], arguments_[i], &found);
        if (found.defined()) return found;
        const at::Tensor made = empty_on(cpu, device_);
        fresh_.push_back(made);
        if (cpu.numel() > 0) {
          Mirror over(Mirror::Kind::kBytes);
          const PlainDispatch plain;
          over.of(made).copy_(cpu);
        }
        return made;
      }));
    }
  }

  void issue(std::function<void()> run) {
    Task task;
    task.label = name_;
    double bytes = 0;
    const auto touch = [&](const at::Tensor& tensor, bool writes) {
      if (!on_sim(tensor)) return;
      task.accesses.push_back(access_of(tensor, writes));
      bytes += static_cast<double>(tensor.numel()) * static_cast<double>(tensor.itemsize());
    };
    const auto& declared = schema_.arguments();
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const auto* alias = i < declared.size() ? declared[i].alias_info() : nullptr;
      const bool writes = alias != nullptr && alias->isWrite();
      for_each_tensor(arguments_[i], [&](const at::Tensor& tensor) { touch(tensor, writes); });
    }
    for (const at::Tensor& tensor : fresh_) touch(tensor, true);
    const Config& config = machine().config();
    task.resource = machine().resource_of_device(device_.index());
    task.amount = std::max(flops_ / config.flops, bytes / config.memory_bandwidth);
    if (mode() == Mode::kEager && run) {
      run();
    } else {
      task.start = std::move(run);
    }
    machine().issue(current_stream(device_.index()), std::move(task));
  }

  const c10::OperatorHandle run_;
  const std::string name_;
  const c10::FunctionSchema& schema_;
  Stack* const stack_;
  Stack arguments_;
  Stack results_;
  std::vector<at::Tensor> fresh_;
  c10::Device device_{kSim, 0};
  double flops_ = 0;
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  DeviceCall call(op, op, stack);
  call(op.schema().arguments().size());
}

c10::OperatorHandle named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void convolution(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  DeviceCall call(op, named("aten::convolution"), stack);
  call(op.schema().arguments().size());
}

// The same arguments but for the sizes of the bias, after the weight.
void convolution_backward(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  DeviceCall call(op, named("aten::convolution_backward"), stack);
  Stack& arguments = call.arguments();
  const at::Tensor gradient = arguments[0].toTensor();
  const bool with_bias = arguments.back().toBoolList().get(2);
  arguments.insert(arguments.begin() + 3,
                   with_bias ? c10::IValue(std::vector<int64_t>{gradient.size(1)}) : c10::IValue());
  call(op.schema().arguments().size());
}

at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                               std::optional<at::Layout>, std::optional<at::Device> device,
                               std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_generic(size, c10::GetAllocator(kSim),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kSim)));
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kSim),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  int64_t count = self.storage_offset();
  count += c10::multiply_integers(size);
  const auto bytes = static_cast<size_t>(count) * self.itemsize();
  if (bytes > self.storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  std::vector<int64_t> strides = stride.vec();
  if (strides.empty()) {
    strides.resize(size.size());
    int64_t step = 1;
    for (size_t d = size.size(); d-- > 0; step *= std::max<int64_t>(size[d], 1)) strides[d] = step;
  }
  impl->set_sizes_and_strides(size, strides);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::GetAllocator(kSim)->allocate(0),
                    c10::GetAllocator(kSim), true);
  return set_storage(self, std::move(none), 0, {0}, {});
}

at::Scalar local_scalar(const at::Tensor& self) {
  TORCH_CHECK(mode() != Mode::kDry, "sim: a dry run has no values");
  machine().synchronize_stream(current_stream(self.device().index()));
  Mirror mirror(Mirror::Kind::kBytes);
  const PlainDispatch plain;
  return mirror.of(self).item();
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  c10::impl::VirtualGuardImpl(kSim).recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// ---- copies ----------------------------------------------------------------

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

void poison(std::byte* at, size_t bytes) { std::memset(at, 0xff, bytes); }

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
  if (!pinned || !non_blocking) machine().synchronize_stream(stream);
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
  Stack stack{to, from, false};
  DeviceCall call(copy, copy, &stack);
  call(3);
}

at::Tensor dense_copy(const at::Tensor& from, const at::Tensor& like) {
  const at::Tensor made =
      empty_on(at::empty(like.sizes(), at::TensorOptions().dtype(like.dtype()).device(at::kMeta)),
               from.device());
  copy_within(from, made);
  return made;
}

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

bool is_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

// The CPU has a kernel of its own, and a device without one would get a
// composite, with other last bits.
bool has_composite_twin(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  if (!op.hasSchema() || op.schema().name() == "aten::_fused_sdp_choice") return false;
  const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
                         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd);
  return composite && op.hasKernelForDispatchKey(DispatchKey::CPU) &&
         !op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) && !is_view(op.schema());
}

}  // namespace

void register_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto& kept = *new std::vector<c10::RegistrationHandleRAII>;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !has_composite_twin(*op)) continue;
    kept.push_back(dispatcher.registerImpl(name, c10::DispatchKey::PrivateUse1,
                                           c10::KernelFunction::makeFromBoxedFunction<&fallback>(),
                                           std::nullopt, nullptr, "sim"));
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  library.impl("set_", TORCH_FN(set_nothing));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("convolution_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&convolution>());
  library.impl("convolution_backward_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

}  // namespace distorch::sim
