// Define mm1_grouped_gemm as an XLA custom call. xla_ffi.py calls it from JAX.
#include <mm1.h>
#include <xla/ffi/api/ffi.h>

namespace ffi = xla::ffi;

static ffi::Error grouped_gemm(void *stream, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Buffer<ffi::S32> offsets,
                               ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::Buffer<ffi::U8>> workspace)
{
    const ffi::DataType type = a.element_type();
    const int dtype = type == ffi::F32 ? MM1_FP32 : type == ffi::BF16 ? MM1_BF16 : type == ffi::F16 ? MM1_FP16 : -1;
    const auto left = a.dimensions(), right = b.dimensions(), out = y->dimensions();
    if (left.size() != 2 || right.size() != 3 || out.size() != 2 || left[1] != right[1] || out[0] != left[0] ||
        out[1] != right[2] || offsets.element_count() != static_cast<size_t>(right[0]) || b.element_type() != type ||
        y->element_type() != type)
        return ffi::Error::InvalidArgument("expected a [M, K], b [E, K, N], offsets [E] -> [M, N]");
    const int result =
        mm1_grouped_gemm(dtype, a.untyped_data(), b.untyped_data(), offsets.typed_data(), y->untyped_data(), left[0],
                         right[0], right[1], right[2], 0, workspace->typed_data(), workspace->size_bytes(), stream);
    return result ? ffi::Error::Internal(mm1_error_string(result)) : ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mm1_xla_grouped_gemm, grouped_gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void *>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>(),
                              {ffi::Traits::kCmdBufferCompatible});
