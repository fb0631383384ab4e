/* libmm1: mm1's forward kernels, compiled ahead of time. Needs no CUDA headers and no driver to link or to load.

   All pointers except `sizes`, `mean` and `std` are device pointers, aligned to 16 bytes. A call enqueues work on `stream`
   (CUstream, cudaStream_t or hipStream_t; NULL: the default stream) of the current context's device, does not wait, and
   may be made from any thread. The first call loads the driver, libcuda.so.1 of CUDA 12 or libamdhip64.so.7, 6 or 5; after
   a failure the next call tries again. The first call of a kernel on a device loads its code: see mm1_prepare. If the
   result is MM1_INVALID, MM1_UNSUPPORTED, MM1_NO_DRIVER or MM1_NO_CONTEXT, nothing was launched. */
#ifndef MM1_H
#define MM1_H

#include <stddef.h>
#include <stdint.h>

#define MM1_VERSION 100 /* major · 10000 + minor · 100 + patch */

#if defined(__GNUC__)
#define MM1_API __attribute__((visibility("default")))
#else
#define MM1_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum mm1_dtype { MM1_FP32, MM1_BF16, MM1_FP16 };

enum mm1_kernel { MM1_GROUPED_GEMM, MM1_EXPERTS_UP, MM1_PATCH_EMBED, MM1_ADAPTIVE_POOL };

enum mm1_result {
    MM1_OK,
    MM1_INVALID,     /* an argument is NULL, out of range or not aligned, or the workspace too small */
    MM1_UNSUPPORTED, /* the library has no code for this GPU, size or setting */
    MM1_NO_DRIVER,   /* neither libcuda.so.1 of CUDA 12 nor libamdhip64.so has a device; the next call tries again */
    MM1_NO_CONTEXT,  /* no device is current in this thread */
    MM1_DRIVER = 1000 /* plus the driver's error code */
};

MM1_API int mm1_version(void);
MM1_API const char *mm1_error_string(int result);

/* Loads the driver and every kernel for the current context's device, so that no later call on that device loads code.
   Call it once for each context, before a graph is captured or before time is measured. It launches nothing, and may run
   at the same time as other calls. It allocates memory for the kernels of all dtypes, and takes longest where the driver
   compiles PTX. After a failure it may be called again. Its results are those of a launch. Calling it is optional. */
MM1_API int mm1_prepare(void);

/* Returns the number of images for a GPU, or 0 if it is not supported. arch: compute capability, major · 10 + minor; 942
   for gfx942. */
MM1_API int mm1_variants(int arch);

/* Returns the number of the variant that a call uses, as in the manifest, or -1 if there is none. dims: for grouped_gemm
   and experts_up rows, experts, k, n; for patch_embed patches, k, width; for adaptive_pool rows, channels. The first is
   below 2^31, the others are at least 1 and below 2^24. */
MM1_API int mm1_choose(int kernel, int arch, int dtype, const int64_t *dims);

/* y[r] = a[r] · b[e] for rows r of expert e, which end at offsets[e]; rows past the last offset are zeros.
   a [rows, k], b [experts, k, n] or, transposed, [experts, n, k], offsets int32 [experts], y [rows, n]; k and n are
   multiples of 16. */
MM1_API size_t mm1_grouped_gemm_workspace(int64_t rows, int64_t experts);
MM1_API int mm1_grouped_gemm(int dtype, const void *a, const void *b, const void *offsets, void *y, int64_t rows,
                             int64_t experts, int64_t k, int64_t n, int transposed, void *workspace,
                             size_t workspace_bytes, void *stream);

/* y[t] = Σ_k weight[t, k] · (silu(x[t] · gate[e]) · (x[t] · up[e])) · down[e], e = index[t, k]; an index outside
   0 … experts - 1 adds nothing. x [tokens, width], index int32 and weight fp32 [tokens, top_k], gate_up [experts, 2 · ffn,
   width], gates before ups, down [experts, width, ffn], y [tokens, width]; width and ffn are multiples of 16. */
MM1_API size_t mm1_moe_mlp_workspace(int dtype, int64_t tokens, int64_t top_k, int64_t experts, int64_t width,
                                     int64_t ffn);
MM1_API int mm1_moe_mlp(int dtype, const void *x, const void *index, const void *weight, const void *gate_up,
                        const void *down, void *y, int64_t tokens, int64_t top_k, int64_t experts, int64_t width,
                        int64_t ffn, void *workspace, size_t workspace_bytes, void *stream);

/* Fills, on the host, the int32 table [images, 4] of (first row, rows, h, w) and the owner [patches] of each row, for
   images of `sizes` (h, w) patches. The two functions below need both on the device. Rows past the last image belong to
   no image. */
MM1_API int mm1_grids(const int32_t *sizes, int64_t images, int64_t patches, int32_t *table, int32_t *owner);

/* tokens[p] = weight · ((pixels of p / 255 - mean) / std) + bias + positions, bilinear with antialiasing, resampled to
   p's image. pixels uint8 [patches · patch_size², 3], image by image and row by row, weight [width, 3 · patch_size²], bias
   [width] and positions [rows, columns, width] or NULL, tokens [patches, width]; mean and std: 3 values each, on the
   host; width is a multiple of 16. */
MM1_API size_t mm1_patch_embed_workspace(int dtype, int64_t patches, int64_t width, int64_t patch_size);
MM1_API int mm1_patch_embed(int dtype, const void *pixels, const void *table, const void *owner, const void *weight,
                            const void *bias, const void *positions, void *tokens, int64_t patches, int64_t width,
                            int64_t patch_size, int64_t rows, int64_t columns, const double *mean, const double *std,
                            void *workspace, size_t workspace_bytes, void *stream);

/* y[n, i, j] = mean of x over the window (i, j) of oh × ow of image n. x [patches, channels], y [images · oh · ow,
   channels]; channels are a multiple of 16. */
MM1_API int mm1_adaptive_pool(int dtype, const void *x, const void *table, void *y, int64_t patches, int64_t images,
                              int64_t channels, int64_t oh, int64_t ow, void *stream);

#ifdef __cplusplus
}
#endif
#endif
