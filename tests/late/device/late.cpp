// A device type of its own over host memory: two devices whose kernels are the CPU's, and whose copies to the host
// arrive some ticks of the clock later. What would make a real device's host wait is told to Python, by name.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <malloc.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <set>

namespace {

constexpr auto kLate = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
thread_local c10::DeviceIndex current = 0;
thread_local bool inside = false;  // a kernel of the CPU is doing this device's work
std::mutex lock;

// ---- what is told to Python -----------------------------------------------------------------------------------------
std::atomic<bool> watched{false}, no_double{false};
std::atomic<long> launches{0}, bytes_now{0}, bytes_peak{0}, bytes_read{0};
std::map<std::string, long> kernels;
py::object* on_wait = nullptr;

void told(const std::string& what) {
  if (inside || !watched) return;
  py::gil_scoped_acquire gil;
  std::string why = py::cast<std::string>((*on_wait)(what));
  TORCH_CHECK(why.empty(), why);
}

// ---- the clock: work is done in order, and what was queued `lag` ticks ago is done -----------------------------------
struct Copy { long at; at::Tensor into, values; };
long queued = 0, done = 0, lag = 0;
std::deque<long> marks;  // what was queued when each of the last ticks came
std::deque<Copy> copies;

void finish_until(long at) {
  std::vector<Copy> arrived;
  {
    std::lock_guard<std::mutex> guard(lock);
    done = std::max(done, at);
    while (!copies.empty() && copies.front().at <= done) { arrived.push_back(copies.front()); copies.pop_front(); }
  }
  at::AutoDispatchBelowAutograd below;
  for (auto& copy : arrived) copy.into.copy_(copy.values);
}
long enqueue() { std::lock_guard<std::mutex> guard(lock); ++queued; if (lag == 0) done = queued; return queued; }
void tick() {
  long at = 0;
  {
    std::lock_guard<std::mutex> guard(lock);
    marks.push_back(queued);
    while ((long)marks.size() > std::max(lag, 1L)) { marks.pop_front(); }
    if ((long)marks.size() >= lag) at = lag ? marks.front() : queued;
  }
  finish_until(at);
}

// ---- memory ---------------------------------------------------------------------------------------------------------
void free_device(void* p) { if (p) bytes_now -= malloc_usable_size(p); std::free(p); }
struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n && !posix_memalign(&p, 64, n)) {
      long now = bytes_now += malloc_usable_size(p), peak = bytes_peak;
      while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {}
    }
    return {p, p, &free_device, c10::Device(kLate, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
} device_memory;
REGISTER_ALLOCATOR(kLate, &device_memory);

std::set<void*> pinned;
void free_pinned(void* p) { { std::lock_guard<std::mutex> guard(lock); pinned.erase(p); } std::free(p); }
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (posix_memalign(&p, 64, n ? n : 64)) p = nullptr;
    std::lock_guard<std::mutex> guard(lock);
    pinned.insert(p);
    return {p, p, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
} pinned_memory;

// ---- what torch asks of a device ------------------------------------------------------------------------------------
void swap_current(c10::DeviceIndex index) { if (index >= 0) current = index; }
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kLate; }
  c10::Device exchangeDevice(c10::Device d) const override { c10::Device old(kLate, current); swap_current(d.index()); return old; }
  c10::Device getDevice() const override { return c10::Device(kLate, current); }
  void setDevice(c10::Device d) const override { swap_current(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { swap_current(d.index()); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kLate, d.index() < 0 ? current : d.index())); }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *event = reinterpret_cast<void*>(1); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { told("synchronize"); finish_until(queued); }
  void synchronizeEvent(void*) const override { told("synchronize"); finish_until(queued); }
  void synchronizeDevice(const c10::DeviceIndex) const override { told("synchronize"); finish_until(queued); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { swap_current(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { auto old = current; swap_current(index); return old; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* p) const override { std::lock_guard<std::mutex> guard(lock); return pinned.count(const_cast<void*>(p)); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(kLate, current); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { static auto g = at::detail::createCPUGenerator(); return g; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// ---- tensors --------------------------------------------------------------------------------------------------------
struct Placed {  // makes a tensor on the device asked for, of a type that it has
  c10::DeviceIndex old = current;
  c10::ScalarType type;
  Placed(std::optional<at::ScalarType> dtype, std::optional<at::Device> device) : type(dtype.value_or(at::kFloat)) {
    TORCH_CHECK_TYPE(!no_double || (type != at::kDouble && type != at::kComplexDouble), "this device has no float64");
    if (device) swap_current(device->index());
  }
  ~Placed() { current = old; }
};
const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
at::Tensor empty_(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  Placed here(dtype, device);
  return at::detail::empty_generic(size, &device_memory, keys, here.type, format);
}
at::Tensor empty_strided_(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  Placed here(dtype, device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, here.type);
}
at::Tensor as_host(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  auto options = at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU);
  return at::from_blob(const_cast<void*>(t.numel() ? t.const_data_ptr() : nullptr), t.sizes(), t.strides(), options);
}
at::Tensor copy_from_(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  bool sent = from.is_cpu() && !to.is_cpu() && from.numel(), read = !from.is_cpu() && to.is_cpu() && from.numel();
  if (sent && !(non_blocking && from.is_pinned())) told("copy from pageable memory");
  if (read && !(non_blocking && to.is_pinned())) told("copy to pageable memory");
  if (read && !inside) bytes_read += from.numel() * from.itemsize();
  if (!inside) launches++;
  at::AutoDispatchBelowAutograd below;
  auto source = as_host(from), target = as_host(to);
  if (read && !inside && non_blocking && to.is_pinned() && lag > 0) {
    // Until it arrives, the host's memory holds something else: here what no sum forgives.
    long at = enqueue();
    if (at::isFloatingType(target.scalar_type())) target.fill_(std::nan(""));
    std::lock_guard<std::mutex> guard(lock);
    copies.push_back({at, target, source.clone()});
    return to;
  }
  target.copy_(source);
  return to;
}
at::Tensor copy_and_resize_(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  bool old = std::exchange(inside, true);
  auto result = copy_from_(from, to, false);
  inside = old;
  return result;
}
at::Scalar read_(const at::Tensor& t) { told("host read"); return as_host(t).item(); }
const at::Tensor& resize_(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (t.storage().nbytes() < need) {
    auto fresh = device_memory.allocate(need);
    std::memcpy(fresh.get(), t.storage().data(), t.storage().nbytes());
    t.storage().set_data_ptr_noswap(std::move(fresh));
    t.storage().set_nbytes(need);
  }
  return t;
}

// ---- kernels: the CPU's ---------------------------------------------------------------------------------------------
const std::set<std::string> kReading = {"aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::masked_select", "aten::bincount", "aten::histc", "aten::_coalesce", "aten::repeat_interleave.Tensor"};
void check_arguments(const std::string& name, const c10::ArrayRef<c10::IValue> arguments) {
  bool indexes = name == "aten::index" || name.find("index_put") != std::string::npos, host = false;
  std::set<int> devices;
  auto look = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == kLate) devices.insert(t.device().index());
    else if (t.is_cpu() && t.dim() > 0) host = true;
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) { for (const auto& t : value.toTensorVector()) look(t); }
    else if (value.isList() && indexes)
      for (const auto& item : value.toListRef()) {
        if (!item.isTensor() || !item.toTensor().defined()) continue;
        const auto& t = item.toTensor();
        if (t.scalar_type() == at::kBool) told("indexing by a mask");
        if (t.is_cpu() && t.numel()) told("indexing by positions on the host");
      }
  }
  TORCH_CHECK(devices.size() < 2 && !(host && !devices.empty() && !indexes), "Expected all tensors to be on the same device (", name, ")");
}
void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& named = op.schema().operator_name();
  std::string name = named.overload_name.empty() ? named.name : named.name + "." + named.overload_name;
  if (!inside) {
    launches++;
    if (watched) { std::lock_guard<std::mutex> guard(lock); kernels[name]++; }
    if (kReading.count(name)) told(name);
    if (named.name != "aten::copy_") check_arguments(named.name, torch::jit::last(*stack, op.schema().arguments().size()));
  }
  bool old = std::exchange(inside, true);
  try { at::native::cpu_fallback(op, stack, false); } catch (...) { inside = old; throw; }
  inside = old;
}
// Its schema does not say that it writes running statistics, so that the fallback would write into copies of them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& var, bool training, double momentum, double eps) {
  if (!inside) launches++;
  auto host = [](const std::optional<at::Tensor>& t) { return t && t->defined() ? as_host(*t) : at::Tensor(); };
  at::AutoDispatchBelowAutograd below;
  bool old = std::exchange(inside, true);
  auto [out, saved, inverse] = at::native_batch_norm(as_host(x), host(weight), host(bias), host(mean), host(var), training, momentum, eps);
  auto found = std::make_tuple(out.to(x.device()), saved.to(x.device()), inverse.to(x.device()));
  inside = old;
  return found;
}
at::Tensor as_strided_(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}
at::Tensor view_(const at::Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor alias_(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) { return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride)); }
at::Tensor& set_storage_(at::Tensor& t, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return t;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_);
  m.impl("empty_strided", empty_strided_);
  m.impl("_copy_from", copy_from_);
  m.impl("_copy_from_and_resize", copy_and_resize_);
  m.impl("_local_scalar_dense", read_);
  m.impl("resize_", resize_);
  m.impl("native_batch_norm", batch_norm_);
  m.impl("as_strided", as_strided_);
  m.impl("view", view_);
  m.impl("_reshape_alias", alias_);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", set_storage_);
  // One launch for many tensors, as on devices that have them.
  for (const char* name : {"_foreach_norm.Scalar", "_foreach_mul_.Scalar", "_foreach_mul_.ScalarList", "_foreach_mul_.Tensor", "_foreach_mul_.List", "_foreach_sub_.List", "_foreach_add_.List", "_foreach_copy_", "_foreach_zero_", "_foreach_max"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("on_wait", [](py::object f) { on_wait = new py::object(std::move(f)); });
  m.def("watch", [](bool on) { watched = on; });
  m.def("no_double", [](bool on) { no_double = on; });
  m.def("set_lag", [](long ticks) { finish_until(queued); std::lock_guard<std::mutex> guard(lock); lag = ticks; marks.clear(); });
  m.def("tick", &tick, py::call_guard<py::gil_scoped_release>());
  m.def("enqueue", &enqueue);
  m.def("is_done", [](long at) { std::lock_guard<std::mutex> guard(lock); return at <= done; });
  m.def("finish_until", &finish_until, py::call_guard<py::gil_scoped_release>());
  m.def("finish", [] { finish_until(queued); });
  m.def("launches", [] { return launches.load(); });
  m.def("bytes_read", [] { return bytes_read.load(); });
  m.def("kernels", [] { std::lock_guard<std::mutex> guard(lock); return kernels; });
  m.def("reset", [] { std::lock_guard<std::mutex> guard(lock); kernels.clear(); launches = 0; bytes_read = 0; bytes_peak = bytes_now.load(); });
  m.def("memory", [] { return std::make_pair(bytes_now.load(), bytes_peak.load()); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("set_device", [](int index) { current = index; });
}
