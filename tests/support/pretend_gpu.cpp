// A card that is none: lets a torch without cards have fake tensors on cuda:0, mps:0 or xpu:0, whichever
// KIND is (CUDA, MPS or XPU; FOR_CUDA too for the first). Streams and events do nothing. Built and loaded by pretend_gpu.py, before
// torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// Names that the kind is a part of: CUDAHooks and CUDAHooksRegistry.
#define JOINED(a, b) a##b
#define JOIN(a, b) JOINED(a, b)
#define HOOKS JOIN(KIND, Hooks)
#define REGISTRY JOIN(HOOKS, Registry)
#define REGISTERER JOIN(Registerer, REGISTRY)
// The macros of torch write down the names that they are given.
#define REGISTER_GUARD(kind, guard) C10_REGISTER_GUARD_IMPL(kind, guard)
// Before those of a torch that was built for CUDA, which come later and are then skipped.
#define REGISTER_HOOKS(registry, hooks) \
  C10_REGISTER_CLASS_WITH_PRIORITY(registry, hooks, c10::REGISTRY_PREFERRED, hooks)

namespace {

constexpr auto kind = c10::DeviceType::KIND;
const c10::Device first(kind, 0);

struct PretendGuard : c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device exchangeDevice(c10::Device) const override { return first; }
  c10::Device getDevice() const override { return first; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool = false) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  c10::Stream stream() const noexcept { return c10::Stream(c10::Stream::DEFAULT, first); }
};

REGISTER_GUARD(KIND, PretendGuard)

// The macro that registers them looks these names up here.
using at::REGISTERER;
using at::REGISTRY;

struct HOOKS : at::JOIN(HOOKS, Interface) {
  HOOKS(at::CUDAHooksArgs = {}) {}  // which those of CUDA alone are given
  bool JOIN(has, KIND)() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
#ifdef FOR_CUDA  // a torch that was built for it asks these before it chooses an attention
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
#endif
};

REGISTER_HOOKS(REGISTRY, HOOKS)

}  // namespace

// A torch that was built for CUDA registers its own guard when it is imported.
extern "C" void guard_again() {
  static PretendGuard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kind)].store(&guard);
}
