// Compute a grouped product from C++, with memory from the driver. The exit status is 77 if there is no GPU.
#include <mm1.h>

#include <cstdio>
#include <dlfcn.h>
#include <vector>

namespace {

void *driver;

template <typename... A>
int cu(const char *name, A... arguments)
{
    auto function = reinterpret_cast<int (*)(A...)>(dlsym(driver, name));
    return function ? function(arguments...) : -1;
}

void *upload(const void *data, size_t bytes)
{
    void *memory = nullptr;
    if (cu("cuMemAlloc_v2", &memory, bytes) || (data && cu("cuMemcpyHtoD_v2", memory, data, bytes)))
        return nullptr;
    return memory;
}

} // namespace

int main()
{
    int device = 0;
    void *context = nullptr;
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver || cu("cuInit", 0u) || cu("cuDeviceGet", &device, 0) || cu("cuDevicePrimaryCtxRetain", &context, device) ||
        cu("cuCtxSetCurrent", context)) {
        std::puts("no GPU");
        return 77;
    }

    const int rows = 200, experts = 4, k = 64, n = 48;
    const std::vector<int> offsets{30, 30, 170, 190}; // the second expert has no rows, the last 10 rows have no expert
    std::vector<float> a(rows * k), b(experts * k * n), y(rows * n);
    for (size_t i = 0; i < a.size(); i++)
        a[i] = static_cast<float>(i * 7 % 11) - 5;
    for (size_t i = 0; i < b.size(); i++)
        b[i] = static_cast<float>(i * 5 % 13) - 6;

    const size_t bytes = mm1_grouped_gemm_workspace(rows, experts);
    void *d_a = upload(a.data(), a.size() * 4), *d_b = upload(b.data(), b.size() * 4);
    void *d_offsets = upload(offsets.data(), offsets.size() * 4), *d_y = upload(nullptr, y.size() * 4);
    void *workspace = upload(nullptr, bytes);
    const int result =
        mm1_grouped_gemm(MM1_FP32, d_a, d_b, d_offsets, d_y, rows, experts, k, n, 0, workspace, bytes, nullptr);
    if (result) {
        std::printf("mm1_grouped_gemm: %s (%d)\n", mm1_error_string(result), result);
        return 1;
    }
    if (cu("cuCtxSynchronize") || cu("cuMemcpyDtoH_v2", y.data(), d_y, y.size() * 4))
        return 1;

    int expert = 0;
    for (int row = 0; row < rows; row++) {
        while (expert < experts && row >= offsets[expert])
            expert++;
        for (int column = 0; column < n; column++) {
            float truth = 0; // sums of small integers are exact in any order
            for (int i = 0; expert < experts && i < k; i++)
                truth += a[row * k + i] * b[(expert * k + i) * n + column];
            if (y[row * n + column] != truth) {
                std::printf("y[%d, %d] is %g, expected %g\n", row, column, y[row * n + column], truth);
                return 1;
            }
        }
    }
    std::puts("equal");
    return 0;
}
