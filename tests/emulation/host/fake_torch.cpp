// The CUDA ops' host code as ops on CPU tensors. The functions here replace torch's, so that the
// tensors seem to lie on a CUDA device; everything else is the installed torch. Linked with
// fake_cuda.cpp and -Bsymbolic, so that the host code finds these functions first.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <map>

#include "../../../csrc/host/append.h"
#include "../../../csrc/host/attention.h"
#include "../../../csrc/host/backward.h"
#include "../../../csrc/host/keep.h"
#include "../fake_cuda.h"

using namespace gqa::host;

namespace {

int default_device = 0;
std::map<const void*, int> device_of_data;  // of tensors that are not on default_device

// Torch's own function of that name.
template <class Function>
Function* real(Function*, const char* name) {
  static void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(dlsym(torch, name));
}
#define GQA_REAL(name) (real(&name, #name))

// "allocate" and "free": a tensor's memory.
void tell(const char* kind, const char* name, AtenTensorHandle tensor, int device) {
  GqaEvent event{};
  event.kind = kind, event.name = name, event.value = device;
  void* data = nullptr;
  int64_t size = 0;
  GQA_REAL(aoti_torch_get_data_ptr)(tensor, &data);
  GQA_REAL(aoti_torch_get_storage_size)(tensor, &size);
  event.address = data, event.bytes = static_cast<size_t>(size);
  gqa_tell(event);
}

}  // namespace

struct DeviceGuardOpaque {
  int before;
};

extern "C" {

void gqa_place(const void* data, int device) { device_of_data[data] = device; }
void gqa_place_others(int device) {
  default_device = device;
  device_of_data.clear();
}

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  if (const auto error = GQA_REAL(aoti_torch_get_data_ptr)(tensor, &data)) return error;
  const auto found = device_of_data.find(data);
  *index = found == device_of_data.end() ? default_device : found->second;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t device,
                                        AtenTensorHandle* result) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  const auto error =
      GQA_REAL(aoti_torch_empty_strided)(dims, sizes, strides, dtype, cpu, 0, result);
  if (!error) tell("allocate", "aoti_torch_empty_strided", *result, device);
  return error;
}
// new_empty and new_zeros of a tensor, which lie where that does.
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  int32_t device = 0;
  aoti_torch_get_device_index(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &device);
  const auto error = GQA_REAL(torch_call_dispatcher)(op, overload, stack, version);
  if (!error) tell("allocate", op, torch::stable::detail::to<AtenTensorHandle>(stack[0]), device);
  return error;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  tell("free", "aoti_torch_delete_tensor_object", tensor, 0);
  return GQA_REAL(aoti_torch_delete_tensor_object)(tensor);
}
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = new DeviceGuardOpaque{gqa_current_device()};
  gqa_set_current_device(index);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  gqa_set_current_device(guard->before);
  delete guard;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

STABLE_TORCH_LIBRARY_IMPL(gqa_host, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&attention<attention_forward_cuda>));
  library.impl("attention_output", TORCH_BOX(&attention_output<attention_output_cuda>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<attention_backward_cuda>));
  library.impl("cache_append", TORCH_BOX(&cache_append<cache_append_cuda>));
  library.impl("cache_keep", TORCH_BOX(&cache_keep<cache_keep_cuda>));
}
