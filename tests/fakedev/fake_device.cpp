// A torch device of type PrivateUse1 whose memory is ordinary RAM.
//
// It counts the bytes it holds, their peak, and the bytes copied to it from the CPU. Operators run
// on the CPU through torch's fallback; only allocation, views and copies are implemented. It has no
// streams: every copy is done when the call returns.

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace {

using at::IntArrayRef;
using at::Tensor;
template <typename T>
using Maybe = std::optional<T>;

constexpr auto kFake = c10::DeviceType::PrivateUse1;

std::atomic<int64_t> held{0}, peak{0}, copied_in{0};
std::mutex lock;
std::unordered_map<void*, size_t> sizes;

void release(void* pointer) {
  if (pointer == nullptr) return;
  std::lock_guard<std::mutex> guard(lock);
  auto found = sizes.find(pointer);
  if (found != sizes.end()) {
    held -= static_cast<int64_t>(found->second);
    sizes.erase(found);
  }
  std::free(pointer);
}

struct CountingAllocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* pointer = size ? std::malloc(size) : nullptr;
    if (pointer != nullptr) {
      std::lock_guard<std::mutex> guard(lock);
      sizes[pointer] = size;
      held += static_cast<int64_t>(size);
      if (held > peak) peak = held.load();
    }
    return {pointer, pointer, &release, at::Device(kFake, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

CountingAllocator allocator;
REGISTER_ALLOCATOR(kFake, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kFake;
  c10::DeviceType type() const override { return kFake; }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Device getDevice() const override { return c10::Device(kFake, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<at::Device>,
             Maybe<bool>, Maybe<at::MemoryFormat>) {
  return at::detail::empty_generic(size, &allocator, kKeys, dtype.value_or(at::kFloat),
                                   std::nullopt);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<at::ScalarType> dtype,
                     Maybe<at::Layout>, Maybe<at::Device>, Maybe<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           dtype.value_or(at::kFloat));
}

Tensor on_cpu(const Tensor& tensor) {  // the same memory, seen as a CPU tensor
  void* memory = tensor.storage().data_ptr().get() ? tensor.mutable_data_ptr() : nullptr;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), options);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.is_cpu() && !to.is_cpu()) copied_in += static_cast<int64_t>(from.nbytes());
  if (from.numel() == 0) return to;
  Tensor target = to.is_cpu() ? to : on_cpu(to);
  target.copy_(from.is_cpu() ? from : on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, Maybe<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }
Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
at::Scalar local_scalar(const Tensor& self) { return on_cpu(self).item(); }
const Tensor& resize(const Tensor& self, IntArrayRef size, Maybe<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}
Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset, size, stride);
}
Tensor& set_source(Tensor& self, at::Storage storage) {
  int64_t size = storage.nbytes() / self.dtype().itemsize();
  return at::native::set_storage_cpu_(self, storage, 0, {size}, {});
}

Tensor convolution(const Tensor& x, const Tensor& weight, const Maybe<Tensor>& bias,
                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed,
                   IntArrayRef output_padding, int64_t groups) {
  Maybe<Tensor> cpu_bias;
  if (bias.has_value() && bias->defined()) cpu_bias = bias->cpu();
  return at::convolution(x.cpu(), weight.cpu(), cpu_bias, stride, padding, dilation, transposed,
                         output_padding, groups)
      .to(x.device());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("held", [] { return held.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = held.load(); });
  m.def("copied_in", [] { return copied_in.load(); });
  m.def("reset_copied_in", [] { copied_in = 0; });
}
