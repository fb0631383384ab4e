/* libmm1 launches the images that mm1/autotune/ahead.py compiled, in the way in which mm1/kernels launches its kernels. */

#define _GNU_SOURCE
#include "mm1.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

enum { MOST_DIMS = 5 };

struct image {
    const unsigned char *code;
    const char *symbol;
    const unsigned char *args; /* names of its arguments, in order */
    unsigned char count, dtype;
    short variant;
    short key[3];
    short warps;
    int shared;
};

struct variant {
    int block_m, block_n, shared;
};

struct choice {
    int low[MOST_DIMS], high[MOST_DIMS];
    int variant;
};

#include "table.h"

_Static_assert((int)DIMS == (int)MOST_DIMS, "MOST_DIMS differs from the tables' DIMS");

enum { DEVICES = 32, MOST_STEPS = 7, EVERYWHERE = 99 << 10, LIMIT = 1 << 24 };

/* One launch. values holds arguments and addresses by name in 8 bytes each; a kernel reads as many bytes as it needs. */
struct step {
    int kernel, dtype, variant;
    int64_t key[3];
    int64_t grid;
    int64_t values[ARGS];
};

struct call {
    int arch; /* index into archs */
    int device;
    bool everywhere; /* the code is for another GPU, so only what fits every GPU's shared memory is used */
    void *stream;
};

/* Functions of CUDA and HIP that share a pointer here have the same declaration. */
struct driver {
    bool amd;
    int (*current)(int *);
    int (*attribute)(int *, int, int);
    int (*load)(void **, const void *, void *, void *, unsigned, void *, void *, unsigned);
    int (*load_amd)(void **, const void *);
    int (*find)(void **, void *, const char *);
    int (*set)(int, int, void *, int);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                  void **);
    int (*function)(void **, void *);
    int (*finish)(void *); /* NULL before CUDA 12.4 */
};

static struct driver driver; /* constant after driver_loaded is set */
static atomic_bool driver_loaded;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static void *libraries[IMAGES]; /* of CUDA, which belong to no context */
static _Atomic(void *) functions[IMAGES][DEVICES];
static atomic_int capabilities[DEVICES];

/* POSIX allows the address of a function to be returned as that of an object. */
#define SYMBOL(function, name) (*(void **)&(function) = dlsym(library, name))

static bool initialized(void *library, const char *name)
{
    int (*init)(unsigned) = NULL;
    return library && SYMBOL(init, name) && !init(0);
}

static bool find_cuda(struct driver *d)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!initialized(library, "cuInit"))
        return false;
    SYMBOL(d->finish, "cuFuncLoad");
    return SYMBOL(d->current, "cuCtxGetDevice") && SYMBOL(d->attribute, "cuDeviceGetAttribute") &&
           SYMBOL(d->load, "cuLibraryLoadData") && SYMBOL(d->find, "cuLibraryGetKernel") &&
           SYMBOL(d->set, "cuKernelSetAttribute") && SYMBOL(d->launch, "cuLaunchKernel") &&
           SYMBOL(d->function, "cuKernelGetFunction");
}

/* A version that the process has loaded already comes first, because another one would not know the process's streams
   and memory. The name without a version belongs to the development files. */
static bool find_hip(struct driver *d)
{
    static const char *const names[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"};
    const int count = sizeof names / sizeof *names;
    d->amd = true;
    for (int i = 0; i < 2 * count; i++) {
        void *library = dlopen(names[i % count], RTLD_NOW | RTLD_LOCAL | (i < count ? RTLD_NOLOAD : 0));
        if (initialized(library, "hipInit") && SYMBOL(d->current, "hipGetDevice") &&
            SYMBOL(d->attribute, "hipDeviceGetAttribute") && SYMBOL(d->load_amd, "hipModuleLoadData") &&
            SYMBOL(d->find, "hipModuleGetFunction") && SYMBOL(d->launch, "hipModuleLaunchKernel"))
            return true;
    }
    return false;
}

/* After a failure the next call tries again, because a driver may be installed while the process runs. Libraries stay
   open, because unloading a driver during its initialization may crash the process. */
static bool find_driver(void)
{
    if (atomic_load(&driver_loaded))
        return true;
    pthread_mutex_lock(&loading);
    if (!atomic_load(&driver_loaded)) {
        struct driver cuda = {0}, hip = {0};
        bool is_cuda = find_cuda(&cuda);
        if (is_cuda || find_hip(&hip)) {
            driver = is_cuda ? cuda : hip;
            atomic_store(&driver_loaded, true);
        }
    }
    pthread_mutex_unlock(&loading);
    return atomic_load(&driver_loaded);
}

static int arch_index(int arch)
{
    int family = -1, ptx = -1;
    for (int i = 0; i < ARCHS; i++) {
        if (archs[i] == arch && arch > 0)
            return i;
        if (archs[i] == 80 && arch / 10 == 8)
            family = i;
        if (archs[i] == 0 && arch > 80 && arch < 900)
            ptx = i;
    }
    return family >= 0 ? family : ptx;
}

static int capability(int device)
{
    int arch = atomic_load(&capabilities[device]), major = 0, minor = 0;
    if (arch)
        return arch;
    /* numbers of the attributes in HIP and in CUDA */
    if (driver.attribute(&major, driver.amd ? 23 : 75, device) ||
        driver.attribute(&minor, driver.amd ? 61 : 76, device))
        return -1;
    arch = !driver.amd ? major * 10 + minor : major == 9 && minor == 4 ? 942 : -1;
    atomic_store(&capabilities[device], arch);
    return arch;
}

static int begin(struct call *call, void *stream)
{
    if (!find_driver())
        return MM1_NO_DRIVER;
    if (driver.current(&call->device))
        return MM1_NO_CONTEXT;
    if (call->device < 0 || call->device >= DEVICES)
        return MM1_UNSUPPORTED;
    int arch = capability(call->device);
    call->arch = arch_index(arch);
    call->stream = stream;
    if (call->arch < 0)
        return MM1_UNSUPPORTED;
    call->everywhere = archs[call->arch] != arch;
    return MM1_OK;
}

static int choose(int op, int arch, bool everywhere, int dtype, const int64_t *dims)
{
    const int *range = choice_begin + (arch * OPS + op) * DTYPES + dtype;
    for (int i = range[0]; i < range[1]; i++) {
        bool holds = !everywhere || variants[choices[i].variant].shared <= EVERYWHERE;
        for (int d = 0; d < DIMS && holds; d++)
            holds = choices[i].low[d] <= dims[d] && dims[d] <= choices[i].high[d];
        if (holds)
            return choices[i].variant;
    }
    return -1;
}

static int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t power_of_2(int64_t n)
{
    int64_t power = 1;
    while (power < n)
        power *= 2;
    return power;
}

static const struct image *find(int arch, const struct step *step)
{
    const short *range = image_begin + arch * KERNELS + step->kernel;
    for (int i = range[0]; i < range[1]; i++) {
        const struct image *image = &images[i];
        if (image->dtype == step->dtype && image->variant == step->variant && image->key[0] == step->key[0] &&
            image->key[1] == step->key[1] && image->key[2] >= step->key[2])
            return image; /* the smallest that suffices, as images are sorted */
    }
    return NULL;
}

static int load(const struct image *image, int device, void **function)
{
    void **library = &libraries[image - images], *module;
    int error = 0;
    if (driver.amd)
        error = driver.load_amd(library = &module, image->code);
    else if (!*library)
        error = driver.load(library, image->code, NULL, NULL, 0, NULL, NULL, 0);
    if (error)
        return *library = NULL, MM1_DRIVER + error;
    error = driver.find(function, *library, image->symbol);
    if (!error && !driver.amd && image->shared > 48 << 10)
        error = driver.set(8 /* maximum dynamic shared memory */, image->shared, *function, device);
    return error ? MM1_DRIVER + error : MM1_OK;
}

static int ready(const struct image *image, int device, void **function)
{
    _Atomic(void *) *cached = &functions[image - images][device];
    int result = MM1_OK;
    if ((*function = atomic_load(cached)))
        return MM1_OK;
    pthread_mutex_lock(&loading);
    if (!(*function = atomic_load(cached)) && !(result = load(image, device, function)))
        atomic_store(cached, *function);
    pthread_mutex_unlock(&loading);
    return result;
}

static int launch(const struct call *call, const struct image *image, void *function, const struct step *step)
{
    static const uint64_t no_scratch = 0;
    const void *params[MOST_ARGS + 3];
    unsigned n = 0, threads = (unsigned)image->warps * (driver.amd ? 64 : 32);
    for (; n < image->count; n++)
        params[n] = &step->values[image->args[n]];
    params[n++] = &no_scratch; /* Triton adds two arguments, which no image here uses */
    params[n++] = &no_scratch;
    params[n] = NULL;
    int error = driver.launch(function, (unsigned)step->grid, 1, 1, threads, 1, 1, (unsigned)image->shared,
                              call->stream, (void **)params, NULL);
    return error ? MM1_DRIVER + error : MM1_OK;
}

/* All images are found and loaded before the first launch. */
static int run(const struct call *call, const struct step *steps, int count)
{
    const struct image *image[MOST_STEPS];
    void *function[MOST_STEPS];
    int result = MM1_OK;
    for (int i = 0; i < count; i++)
        if (!(image[i] = find(call->arch, &steps[i])) || steps[i].grid > INT32_MAX)
            return MM1_UNSUPPORTED;
    for (int i = 0; i < count && !result; i++)
        result = ready(image[i], call->device, &function[i]);
    for (int i = 0; i < count && !result; i++)
        result = launch(call, image[i], function[i], &steps[i]);
    return result;
}

static int64_t address(const void *pointer) { return (int64_t)(uintptr_t)pointer; }

/* Adds bytes to an address. Unsigned arithmetic may wrap around without undefined behaviour. */
static int64_t offset_by(int64_t address, int64_t bytes) { return (int64_t)((uint64_t)address + (uint64_t)bytes); }

static int64_t real(double value)
{
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return bits;
}

static bool aligned(int count, const void *const *pointers)
{
    for (int i = 0; i < count; i++)
        if (!pointers[i] || address(pointers[i]) % 16)
            return false;
    return true;
}
#define ALIGNED(...) \
    aligned(sizeof((const void *[]){__VA_ARGS__}) / sizeof(void *), (const void *[]){__VA_ARGS__})

static bool typed(int dtype) { return dtype >= 0 && dtype < DTYPES; }
static int64_t bytes(int dtype) { return dtype == MM1_FP32 ? 4 : 2; }
static bool number(int64_t n) { return n >= 0 && n <= INT32_MAX; }
static bool positive(int64_t n) { return n > 0 && n < LIMIT; }
static bool multiple(int64_t n) { return positive(n) && n % 16 == 0; }

/* Allocates from a workspace. Its base is 0 if only its size is wanted. */
static int64_t take(int64_t *at, int64_t size)
{
    int64_t here = *at;
    *at = offset_by(here, (size + 255) & ~(int64_t)255);
    return here;
}

/* Rows sorted by expert. Each program of a product computes one tile of them. */
struct sorted {
    int64_t rows, experts;
    bool tail; /* rows that belong to no expert have tiles too */
    int64_t offsets, tiles, by_size;
};

static int64_t tiles_of(const struct sorted *s, int block_m)
{
    int64_t most = cdiv(s->rows, block_m) + s->experts + s->tail;
    return most < s->rows ? most : s->rows;
}

static void take_tiles(struct sorted *s, int64_t *at)
{
    s->tiles = take(at, 12 * tiles_of(s, 16));
    s->by_size = take(at, 4 * s->experts);
}

static int choose_product(const struct call *call, int op, int dtype, const struct sorted *s, int64_t k, int64_t n)
{
    int64_t dims[] = {s->rows, s->experts, k, n, cdiv(s->rows, s->experts)};
    return choose(op, call->arch, call->everywhere, dtype, dims);
}

static struct step map_step(const struct sorted *s, int variant)
{
    int block_m = variants[variant].block_m;
    int64_t num_m = tiles_of(s, block_m);
    return (struct step){
        KERNEL_map, 0, -1, {s->tail, block_m, power_of_2(s->experts)}, cdiv(num_m, MAP_SIDE),
        {[ARG_offsets_ptr] = s->offsets, [ARG_tiles_ptr] = s->tiles, [ARG_by_size_ptr] = s->by_size,
         [ARG_M] = s->rows, [ARG_E] = s->experts, [ARG_num_m] = num_m}};
}

/* b is [experts, k, n] or, transposed, [experts, n, k]. Strides of 1 are constants of the images. */
static struct step gemm_step(const struct sorted *s, int dtype, int variant, bool transposed, int64_t a, int64_t b,
                             int64_t y, int64_t k, int64_t n)
{
    int64_t num_m = tiles_of(s, variants[variant].block_m);
    return (struct step){
        KERNEL_gemm, dtype, variant, {transposed}, num_m * cdiv(n, variants[variant].block_n),
        {[ARG_a] = a, [ARG_b] = b, [ARG_b2] = b, [ARG_y_ptr] = y, [ARG_tiles_ptr] = s->tiles, [ARG_stride_am] = k,
         [ARG_stride_be] = k * n, [ARG_stride_bk] = n, [ARG_stride_bn] = k, [ARG_stride_b2e] = k * n,
         [ARG_stride_b2k] = n, [ARG_stride_b2n] = k, [ARG_stride_ym] = n, [ARG_E] = s->experts, [ARG_K] = k,
         [ARG_N] = n, [ARG_num_m] = num_m}};
}

size_t mm1_grouped_gemm_workspace(int64_t rows, int64_t experts)
{
    struct sorted s = {.rows = rows, .experts = experts, .tail = true};
    int64_t size = 0;
    if (number(rows) && positive(experts))
        take_tiles(&s, &size);
    return (size_t)size;
}

int mm1_grouped_gemm(int dtype, const void *a, const void *b, const void *offsets, void *y, int64_t rows,
                     int64_t experts, int64_t k, int64_t n, int transposed, void *workspace, size_t workspace_bytes,
                     void *stream)
{
    struct call call;
    if (!typed(dtype) || !number(rows) || !positive(experts) || !multiple(k) || !multiple(n) || !number(k * n))
        return MM1_INVALID;
    if (rows == 0)
        return MM1_OK;
    if (!ALIGNED(a, b, offsets, y, workspace) || workspace_bytes < mm1_grouped_gemm_workspace(rows, experts))
        return MM1_INVALID;
    int result = begin(&call, stream);
    if (result)
        return result;
    struct sorted s = {.rows = rows, .experts = experts, .tail = true, .offsets = address(offsets)};
    int64_t at = address(workspace);
    take_tiles(&s, &at);
    int variant = choose_product(&call, MM1_GROUPED_GEMM, dtype, &s, k, n);
    if (variant < 0)
        return MM1_UNSUPPORTED;
    struct step steps[] = {
        map_step(&s, variant),
        gemm_step(&s, dtype, variant, transposed, address(a), address(b), address(y), k, n),
    };
    return run(&call, steps, 2);
}

struct moe {
    struct sorted sorted;
    int64_t chunk, programs;
    int64_t slots, position, counts, s, y, end;
};

static struct moe moe_of(int64_t at, int dtype, int64_t slots, int64_t experts, int64_t width, int64_t ffn)
{
    struct moe m = {.sorted = {.rows = slots, .experts = experts}, .chunk = power_of_2(cdiv(slots, 128))};
    m.chunk = m.chunk < 128 ? 128 : m.chunk;
    m.programs = cdiv(slots, m.chunk);
    m.slots = take(&at, 4 * slots);
    m.position = take(&at, 4 * slots);
    m.sorted.offsets = take(&at, 4 * experts);
    m.counts = take(&at, 4 * m.programs * MOST_BINS);
    take_tiles(&m.sorted, &at);
    m.s = take(&at, slots * ffn * bytes(dtype));
    m.y = take(&at, slots * width * bytes(dtype));
    m.end = at;
    return m;
}

static struct step sort_step(int kernel, const struct moe *m, const void *index)
{
    int64_t experts = m->sorted.experts;
    return (struct step){
        kernel, 0, -1, {0, 0, power_of_2(experts + 1)}, m->programs,
        {[ARG_index_ptr] = address(index), [ARG_counts_ptr] = m->counts, [ARG_slots_ptr] = m->slots,
         [ARG_position_ptr] = m->position, [ARG_offsets_ptr] = m->sorted.offsets, [ARG_S] = m->sorted.rows,
         [ARG_E] = experts, [ARG_CHUNK] = m->chunk}};
}

static struct step up_step(const struct moe *m, int dtype, int variant, int64_t top_k, const void *x,
                           const void *gate_up, int64_t width, int64_t ffn)
{
    int64_t num_m = tiles_of(&m->sorted, variants[variant].block_m), half = ffn * width;
    return (struct step){
        KERNEL_up, dtype, variant, {top_k}, num_m * cdiv(ffn, variants[variant].block_n),
        {[ARG_x_ptr] = address(x), [ARG_gate] = address(gate_up),
         [ARG_up] = offset_by(address(gate_up), half * bytes(dtype)), [ARG_slots_ptr] = m->slots, [ARG_s_ptr] = m->s,
         [ARG_h_ptr] = m->s, [ARG_tiles_ptr] = m->sorted.tiles,
         [ARG_stride_xm] = width, [ARG_stride_ge] = 2 * half, [ARG_stride_gn] = width, [ARG_stride_ue] = 2 * half,
         [ARG_stride_un] = width, [ARG_D] = width, [ARG_F] = ffn, [ARG_num_m] = num_m}};
}

static struct step combine_step(const struct moe *m, int dtype, int64_t top_k, const void *weight, void *y,
                                int64_t width)
{
    return (struct step){
        KERNEL_combine, dtype, -1, {top_k, 1024}, m->sorted.rows / top_k * cdiv(width, 1024),
        {[ARG_y_ptr] = m->y, [ARG_position_ptr] = m->position, [ARG_weight_ptr] = address(weight),
         [ARG_offsets_ptr] = m->sorted.offsets, [ARG_out_ptr] = address(y), [ARG_D] = width,
         [ARG_E] = m->sorted.experts}};
}

size_t mm1_moe_mlp_workspace(int dtype, int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t ffn)
{
    bool sizes = typed(dtype) && number(tokens) && positive(top_k) && number(tokens * top_k) && positive(experts) &&
                 multiple(width) && multiple(ffn) && number(2 * width * ffn);
    return sizes ? (size_t)moe_of(0, dtype, tokens * top_k, experts, width, ffn).end : 0;
}

int mm1_moe_mlp(int dtype, const void *x, const void *index, const void *weight, const void *gate_up, const void *down,
                void *y, int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t ffn, void *workspace,
                size_t workspace_bytes, void *stream)
{
    struct call call;
    size_t wanted = mm1_moe_mlp_workspace(dtype, tokens, top_k, experts, width, ffn);
    if (wanted && tokens == 0)
        return MM1_OK;
    if (!wanted || workspace_bytes < wanted || !ALIGNED(x, index, weight, gate_up, down, y, workspace))
        return MM1_INVALID;
    int result = begin(&call, stream);
    if (result)
        return result;
    struct moe m = moe_of(address(workspace), dtype, tokens * top_k, experts, width, ffn);
    int first = choose_product(&call, MM1_EXPERTS_UP, dtype, &m.sorted, width, ffn);
    int second = choose_product(&call, MM1_GROUPED_GEMM, dtype, &m.sorted, ffn, width);
    if (first < 0 || second < 0)
        return MM1_UNSUPPORTED;
    struct step steps[MOST_STEPS] = {
        sort_step(KERNEL_count, &m, index),
        sort_step(KERNEL_place, &m, index),
        map_step(&m.sorted, first),
        up_step(&m, dtype, first, top_k, x, gate_up, width, ffn),
    };
    int count = 4;
    if (variants[second].block_m != variants[first].block_m) /* else both products have the same map */
        steps[count++] = map_step(&m.sorted, second);
    steps[count++] = gemm_step(&m.sorted, dtype, second, true, m.s, address(down), m.y, ffn, width);
    steps[count++] = combine_step(&m, dtype, top_k, weight, y, width);
    return run(&call, steps, count);
}

int mm1_grids(const int32_t *sizes, int64_t count, int64_t patches, int32_t *table, int32_t *owner)
{
    int64_t first = 0;
    if (!sizes || !table || !owner || !number(count) || !number(patches))
        return MM1_INVALID;
    for (int64_t i = 0; i < count; i++) {
        int64_t h = sizes[2 * i], w = sizes[2 * i + 1];
        if (h < 1 || w < 1 || h * w > patches - first)
            return MM1_INVALID;
        memcpy(table + 4 * i, (int32_t[]){(int32_t)first, (int32_t)(h * w), sizes[2 * i], sizes[2 * i + 1]}, 16);
        for (int64_t end = first + h * w; first < end; first++)
            owner[first] = (int32_t)i;
    }
    for (; first < patches; first++)
        owner[first] = (int32_t)(count - 1);
    return MM1_OK;
}

enum { TAPS = 9 }; /* fields stored for each patch; the workspace reserves them even without positions */

struct embed {
    int64_t k, padded;
    int64_t cut, taps, weight, bias, end;
};

static struct embed embed_of(int64_t at, int dtype, int64_t patches, int64_t width, int64_t patch_size)
{
    struct embed e = {.k = 3 * patch_size * patch_size};
    e.padded = cdiv(e.k, 16) * 16;
    e.cut = take(&at, patches * e.padded * bytes(dtype));
    e.taps = take(&at, 4 * TAPS * patches);
    e.weight = take(&at, width * e.padded * bytes(dtype));
    e.bias = take(&at, 4 * width);
    e.end = at;
    return e;
}

static struct step fold_step(const struct embed *e, int dtype, const void *weight, const void *bias, int64_t width,
                             const double *mean, const double *std)
{
    struct step step = {
        KERNEL_fold, dtype, -1, {bias != NULL}, width,
        {[ARG_w_ptr] = address(weight), [ARG_bias_ptr] = address(bias), [ARG_folded_ptr] = e->weight,
         [ARG_folded_bias_ptr] = e->bias, [ARG_stride_n] = e->k, [ARG_K] = e->k, [ARG_K_PADDED] = e->padded}};
    const int scale[] = {ARG_scale0, ARG_scale1, ARG_scale2}, shift[] = {ARG_shift0, ARG_shift1, ARG_shift2};
    for (int c = 0; c < 3; c++) { /* the kernel subtracts 128 from the pixels */
        step.values[scale[c]] = real(1 / (255 * std[c]));
        step.values[shift[c]] = real((128.0 / 255 - mean[c]) / std[c]);
    }
    return step;
}

size_t mm1_patch_embed_workspace(int dtype, int64_t patches, int64_t width, int64_t patch_size)
{
    bool sizes = typed(dtype) && number(patches) && multiple(width) && patch_size > 0 && patch_size <= 256;
    return sizes ? (size_t)embed_of(0, dtype, patches, width, patch_size).end : 0;
}

static bool statistics(const double *mean, const double *std)
{
    for (int c = 0; c < 3; c++)
        if (!mean || !std || !isfinite(mean[c]) || !isfinite(std[c]) || std[c] <= 0)
            return false;
    return true;
}

int mm1_patch_embed(int dtype, const void *pixels, const void *table, const void *owner, const void *weight,
                    const void *bias, const void *positions, void *tokens, int64_t patches, int64_t width,
                    int64_t patch_size, int64_t rows, int64_t columns, const double *mean, const double *std,
                    void *workspace, size_t workspace_bytes, void *stream)
{
    struct call call;
    size_t wanted = mm1_patch_embed_workspace(dtype, patches, width, patch_size);
    if (wanted && patches == 0)
        return MM1_OK;
    if (!wanted || workspace_bytes < wanted || !statistics(mean, std) ||
        !ALIGNED(pixels, table, owner, weight, tokens, workspace) || (bias && !ALIGNED(bias)) ||
        (positions && (!ALIGNED(positions) || !positive(rows) || !positive(columns) || !number(rows * columns))))
        return MM1_INVALID;
    int result = begin(&call, stream);
    if (result)
        return result;
    struct embed e = embed_of(address(workspace), dtype, patches, width, patch_size);
    int variant = choose(MM1_PATCH_EMBED, call.arch, call.everywhere, dtype, (int64_t[DIMS]){patches, e.k, width});
    if (variant < 0)
        return MM1_UNSUPPORTED;
    int64_t grid = cdiv(patches, variants[variant].block_m) * cdiv(width, variants[variant].block_n);
    struct step steps[] = {
        {KERNEL_cut, dtype, -1, {patch_size, positions != NULL}, cdiv(patches, CUT_ROWS) * cdiv(e.padded, CUT_VALUES),
         {[ARG_x_ptr] = address(pixels), [ARG_owner_ptr] = address(owner), [ARG_images_ptr] = address(table),
          [ARG_cut_ptr] = e.cut, [ARG_taps_ptr] = e.taps, [ARG_P] = patches, [ARG_Gh] = positions ? rows : 1,
          [ARG_Gw] = positions ? columns : 1}},
        fold_step(&e, dtype, weight, bias, width, mean, std),
        {KERNEL_embed, dtype, variant, {e.padded, positions != NULL}, grid,
         {[ARG_x] = e.cut, [ARG_w] = e.weight, [ARG_bias_ptr] = e.bias, [ARG_table_ptr] = address(positions),
          [ARG_taps_ptr] = e.taps, [ARG_y_ptr] = address(tokens), [ARG_P] = patches, [ARG_N] = width,
          [ARG_Gh] = positions ? rows : 1, [ARG_Gw] = positions ? columns : 1, [ARG_stride_x] = e.padded,
          [ARG_stride_w] = e.padded}},
    };
    return run(&call, steps, 3);
}

int mm1_adaptive_pool(int dtype, const void *x, const void *table, void *y, int64_t patches, int64_t count,
                      int64_t channels, int64_t oh, int64_t ow, void *stream)
{
    struct call call;
    if (!typed(dtype) || !number(patches) || !number(count) || !multiple(channels) || oh < 1 || oh > 1023 || ow < 1 ||
        ow > 1023)
        return MM1_INVALID;
    if (count == 0)
        return MM1_OK;
    if (!ALIGNED(x, table, y))
        return MM1_INVALID;
    int result = begin(&call, stream);
    if (result)
        return result;
    int variant = choose(MM1_ADAPTIVE_POOL, call.arch, call.everywhere, dtype, (int64_t[DIMS]){patches, channels});
    if (variant < 0)
        return MM1_UNSUPPORTED;
    struct step step = {
        KERNEL_pool, dtype, variant, {oh, ow, channels}, count * oh * ow,
        {[ARG_x_ptr] = address(x), [ARG_table_ptr] = address(table), [ARG_y_ptr] = address(y), [ARG_C] = channels}};
    return run(&call, &step, 1);
}

/* Makes CUDA load a kernel's code now instead of at its first launch in a context. */
static int finish(void *kernel)
{
    void *function;
    int error = driver.amd ? 0 : driver.function(&function, kernel);
    if (!error && driver.finish)
        error = driver.finish(function);
    return error ? MM1_DRIVER + error : MM1_OK;
}

int mm1_prepare(void)
{
    struct call call;
    int result = begin(&call, NULL);
    if (result)
        return result;
    const struct image *image = images + image_begin[call.arch * KERNELS];
    const struct image *end = images + image_begin[(call.arch + 1) * KERNELS];
    for (; image < end && !result; image++) {
        void *function;
        if (call.everywhere && image->shared > EVERYWHERE)
            continue; /* no call can choose it */
        result = ready(image, call.device, &function);
        if (!result)
            result = finish(function);
    }
    return result;
}

int mm1_version(void) { return MM1_VERSION; }

int mm1_variants(int arch)
{
    int a = arch_index(arch);
    return a < 0 ? 0 : image_begin[(a + 1) * KERNELS] - image_begin[a * KERNELS];
}

int mm1_choose(int kernel, int arch, int dtype, const int64_t *dims)
{
    int a = arch_index(arch);
    if (kernel < 0 || kernel >= OPS || !typed(dtype) || !dims || a < 0)
        return -1;
    bool product = kernel == MM1_GROUPED_GEMM || kernel == MM1_EXPERTS_UP;
    const int count = product ? 4 : kernel == MM1_PATCH_EMBED ? 3 : 2;
    int64_t all[DIMS] = {0};
    for (int d = 0; d < count; d++) {
        if (d ? !positive(dims[d]) : !number(dims[d]))
            return -1;
        all[d] = dims[d];
    }
    if (product)
        all[4] = cdiv(all[0], all[1]);
    return choose(kernel, a, archs[a] != arch, dtype, all);
}

const char *mm1_error_string(int result)
{
    switch (result) {
    case MM1_OK: return "done";
    case MM1_INVALID: return "an argument is NULL, out of range or not aligned, or the workspace is too small";
    case MM1_UNSUPPORTED: return "the library has no code for this GPU, size or setting";
    case MM1_NO_DRIVER: return "no CUDA 12 driver and no HIP runtime with a device";
    case MM1_NO_CONTEXT: return "no device is current in this thread";
    }
    return result >= MM1_DRIVER ? "the driver failed; its error code is the result minus 1000" : "not a result of libmm1";
}
