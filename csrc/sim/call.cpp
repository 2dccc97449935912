// SPDX-License-Identifier: Apache-2.0
#include "sim/call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/clone.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <unordered_set>

namespace distorch::sim {
namespace {

using torch::jit::Stack;

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
  if (name == "distorch::decode_") {
    double ranks = 0;
    for (const at::Tensor& down : arguments.at(6).toTensorVector()) ranks += down.size(0);
    return 2.0 * static_cast<double>(tensor(0).numel()) * ranks;
  }
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
      // A number that the host was given (of aten::equal): it waited for the operator.
      const auto is_tensor = [](const c10::IValue& value) { return value.isTensor(); };
      if (!results_.empty() && std::none_of(results_.begin(), results_.end(), is_tensor) &&
          !results_.front().isList()) {
        machine().synchronize_stream(current_stream(device_.index()));
      }
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

}  // namespace

at::Tensor empty_on(const at::Tensor& geometry, c10::Device device) {
  const c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      geometry.sizes(), geometry.strides(), c10::GetAllocator(kSim),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), geometry.scalar_type());
}

void call_on_device(const c10::OperatorHandle& op, const c10::OperatorHandle& run, Stack* stack,
                    const std::function<void(Stack&)>& adapt) {
  DeviceCall call(op, run, stack);
  if (adapt) adapt(call.arguments());
  call(op.schema().arguments().size());
}

}  // namespace distorch::sim
