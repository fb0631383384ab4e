// Define mm1_grouped_gemm as an operator of torch's stable ABI: one binary for torch 2.10 and later, with or without a GPU.
#include <mm1.h>

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The function is looked up at run time, because torch without CUDA lacks it and must be able to load this library.
static void *current_stream(int device)
{
    using get = AOTITorchError (*)(int32_t, void **);
    static const auto function = reinterpret_cast<get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
    void *stream = nullptr;
    STD_TORCH_CHECK(function && function(device, &stream) == AOTI_TORCH_SUCCESS, "no CUDA stream");
    return stream;
}

static Tensor grouped_gemm(Tensor a, Tensor b, Tensor offsets)
{
    const auto type = a.scalar_type();
    const int dtype = type == ScalarType::Float      ? MM1_FP32
                      : type == ScalarType::BFloat16 ? MM1_BF16
                      : type == ScalarType::Half     ? MM1_FP16
                                                     : -1;
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 3 && offsets.dim() == 1 && a.size(1) == b.size(1) &&
                        offsets.size(0) == b.size(0),
                    "expected a [M, K], b [E, K, N], offsets [E]");
    STD_TORCH_CHECK(b.scalar_type() == type && offsets.scalar_type() == ScalarType::Int, "dtypes of b, offsets");
    STD_TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && offsets.is_contiguous(), "expected contiguous tensors");
    const int64_t rows = a.size(0), experts = b.size(0), bytes = mm1_grouped_gemm_workspace(rows, experts);
    const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
    Tensor y = torch::stable::new_empty(a, {rows, b.size(2)});
    Tensor workspace = torch::stable::new_empty(a, {bytes}, ScalarType::Byte);
    const int result = mm1_grouped_gemm(dtype, a.data_ptr(), b.data_ptr(), offsets.data_ptr(), y.data_ptr(), rows, experts,
                                        b.size(1), b.size(2), 0, workspace.data_ptr(), static_cast<size_t>(bytes),
                                        current_stream(a.get_device_index()));
    STD_TORCH_CHECK(result == MM1_OK, "mm1_grouped_gemm: ", mm1_error_string(result));
    return y;
}

STABLE_TORCH_LIBRARY(libmm1, m) { m.def("grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(libmm1, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
