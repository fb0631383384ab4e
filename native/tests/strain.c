/* Run the library under sanitizers: with extreme numbers, with a driver that appears late, and in eight threads. */
#define _GNU_SOURCE
#include "mm1.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPECT(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

enum { THREADS = 8, CAPABILITIES = 12 };

static const int64_t numbers[] = {INT64_MIN, INT64_MIN + 1, -(1LL << 32), -1, 0, 1, 15, 16, 2048, (1LL << 24) - 16,
                                  1LL << 24, INT32_MAX, 1LL << 31, 1LL << 33, INT64_MAX - 15, INT64_MAX};
enum { NUMBERS = sizeof numbers / sizeof *numbers };
static int capabilities[CAPABILITIES], supported;
static pthread_barrier_t together;
static void (*set_current)(int);

/* Calls every function with all pairs of these numbers as sizes. */
static void hostile(void)
{
    void *place = (void *)0x7ffffffffffffff0; /* the largest aligned positive address */
    for (int c = 0; c < supported; c++)
        for (int i = 0; i < NUMBERS; i++)
            for (int j = 0; j < NUMBERS; j++) {
                int64_t a = numbers[i], b = numbers[j];
                for (int kernel = -1; kernel < 5; kernel++)
                    for (int one = 0; one < 4; one++) {
                        static const int sizes[] = {0, 4, 4, 3, 2, 0}; /* of dims by kernel + 1 */
                        int64_t dims[] = {b, b, b, b};
                        dims[one] = a;
                        bool good = sizes[kernel + 1] > 0;
                        for (int d = 0; d < sizes[kernel + 1]; d++)
                            good = good && dims[d] >= (d > 0) && dims[d] < (d ? 1LL << 24 : 1LL << 31);
                        EXPECT(good || mm1_choose(kernel, capabilities[c], MM1_BF16, dims) == -1);
                        mm1_choose(kernel, capabilities[c], MM1_BF16, dims);
                    }
            }
    for (int i = 0; i < NUMBERS; i++)
        for (int j = 0; j < NUMBERS; j++) {
            int64_t a = numbers[i], b = numbers[j];
            size_t all = SIZE_MAX;
            mm1_grouped_gemm_workspace(a, b);
            mm1_moe_mlp_workspace(MM1_FP32, a, b, b, a, b);
            mm1_moe_mlp_workspace(MM1_FP32, b, 2, 8, a, 2048);
            mm1_patch_embed_workspace(MM1_FP32, a, b, 14);
            mm1_patch_embed_workspace(MM1_FP32, 100, 1024, a);
            mm1_variants((int)a);
            mm1_grouped_gemm(MM1_BF16, place, place, place, place, a, b, 2048, 1024, 0, place, all, NULL);
            mm1_grouped_gemm(MM1_BF16, place, place, place, place, 1000, 8, a, b, 1, place, all, NULL);
            mm1_moe_mlp(MM1_FP32, place, place, place, place, place, place, a, 2, b, 2048, 1024, place, all, NULL);
            mm1_moe_mlp(MM1_FP32, place, place, place, place, place, place, 100, a, 8, b, b, place, all, NULL);
            double mean[] = {0, 0, 0}, std[] = {1, 1, 1};
            mm1_patch_embed(MM1_FP16, place, place, place, place, NULL, place, place, a, b, 14, a, b, mean, std, place,
                            all, NULL);
            mm1_adaptive_pool(MM1_BF16, place, place, place, a, b, 2048, 12, 12, NULL);
            mm1_adaptive_pool(MM1_BF16, place, place, place, 100, 5, 2048, a, b, NULL);
            int32_t sizes[] = {INT32_MAX, INT32_MAX}, table[4], owner[1];
            EXPECT(mm1_grids(sizes, 1, 1, table, owner) == MM1_INVALID);
        }
}

static void *work(void *number)
{
    static const int64_t dims[] = {1000, 8, 2048, 1024};
    void *place = (void *)0x100000000;
    long n = (long)number;
    set_current((int)(n % supported));
    pthread_barrier_wait(&together);
    for (int i = 0; i < 20; i++) {
        EXPECT(mm1_prepare() == MM1_OK);
        int result = mm1_grouped_gemm(MM1_BF16, place, place, place, place, 1000, 8, 2048, 1024, 1, place, 1 << 30,
                                      NULL);
        EXPECT(result == MM1_OK);
        EXPECT(mm1_choose(MM1_GROUPED_GEMM, capabilities[n % supported], MM1_BF16, dims) >= 0);
    }
    return NULL;
}

int main(void)
{
    for (int arch = 80; arch < 122; arch++)
        if (mm1_variants(arch) && supported < CAPABILITIES)
            capabilities[supported++] = arch;
    if (!supported)
        return 77;
    EXPECT(mm1_prepare() == MM1_NO_DRIVER);
    hostile();

    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    EXPECT(driver);
    void (*set_device)(int, int);
    *(void **)&set_device = dlsym(driver, "stub_device");
    *(void **)&set_current = dlsym(driver, "stub_current");
    unsetenv("STUB_NO_DEVICE");
    for (int device = 0; device < supported; device++)
        set_device(device, capabilities[device]);
    pthread_barrier_init(&together, NULL, THREADS);
    pthread_t threads[THREADS];
    for (long i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)i);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    int (*twice)(void);
    *(void **)&twice = dlsym(driver, "stub_twice");
    EXPECT(twice() == 0);
    EXPECT(mm1_prepare() == MM1_NO_CONTEXT);
    set_current(0);
    hostile();
    return 0;
}
