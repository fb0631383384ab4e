/* A driver that records launches and runs nothing: it is libcuda.so.1 and libamdhip64.so in the tests. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST = 4096, ARGS = 64, DEVICES = 16 };

struct kernel {
    const char *name;
    const void *code;
    int device;          /* of a HIP module; -1: any */
    int shared[DEVICES]; /* maximum shared memory that was set */
    int loaded[DEVICES]; /* whether code was loaded before the launch */
};

struct record {
    const char *name;
    const void *code;
    unsigned grid[3], block[3], shared;
    int device, count;
    void *stream;
    uint64_t args[ARGS];
};

static struct record records[MOST];
static int count, loads, twice, lazy, failing, units;
static const void *images[MOST];
static int capability[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int current = -1;

void stub_device(int device, int cc) { capability[device] = cc, units = device >= units ? device + 1 : units; }
void stub_current(int device) { current = device; }
void stub_fail(int code) { failing = code; }
void stub_clear(void) { count = 0; }
int stub_count(void) { return count; }
int stub_loads(void) { return loads; }
int stub_twice(void) { return twice; } /* number of images that were loaded again, as HIP does for each device */
int stub_lazy(void) { return lazy; } /* number of launches that loaded code */
const struct record *stub_record(int i) { return &records[i]; }

/* Waits long enough for other threads to arrive. */
static void take_time(void)
{
    if (getenv("STUB_SLOW"))
        nanosleep(&(struct timespec){0, 200000}, NULL);
}

int cuInit(unsigned flags) { return take_time(), flags || getenv("STUB_NO_DEVICE") ? 100 : 0; }
int hipInit(unsigned flags) { return cuInit(flags); }

int cuCtxGetDevice(int *device) { return (*device = current) < 0 ? 201 : 0; }
int hipGetDevice(int *device) { return cuCtxGetDevice(device); }

static int attribute(int *value, int major, int minor, int asked, int device)
{
    if (device < 0 || device >= units || (asked != major && asked != minor))
        return 1;
    *value = asked == major ? capability[device] / 10 : capability[device] % 10;
    return 0;
}

int cuDeviceGetAttribute(int *value, int asked, int device) { return attribute(value, 75, 76, asked, device); }
int hipDeviceGetAttribute(int *value, int asked, int device) { return attribute(value, 23, 61, asked, device); }

static int load(void **library, const void *code, int device)
{
    struct kernel *kernel = calloc(1, sizeof *kernel);
    take_time();
    kernel->code = code, kernel->device = device, *library = kernel;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < loads && i < MOST; i++)
        if (images[i] == code) {
            twice++;
            break;
        }
    images[loads++ % MOST] = code;
    pthread_mutex_unlock(&lock);
    return failing;
}

int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m)
{
    return a || b || n || c || d || m ? 1 : load(library, code, -1);
}
int hipModuleLoadData(void **library, const void *code) { return load(library, code, current); }

int cuLibraryGetKernel(void **kernel, void *library, const char *name)
{
    ((struct kernel *)library)->name = name, *kernel = library;
    return 0;
}
int hipModuleGetFunction(void **kernel, void *library, const char *name) { return cuLibraryGetKernel(kernel, library, name); }

int cuKernelSetAttribute(int attribute, int value, struct kernel *kernel, int device)
{
    if (attribute != 8)
        return 1;
    kernel->shared[device] = value;
    return 0;
}

int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, current < 0 ? 201 : 0; }

int cuFuncLoad(struct kernel *kernel)
{
    pthread_mutex_lock(&lock);
    kernel->loaded[current] = 1;
    pthread_mutex_unlock(&lock);
    return 0;
}

int cuLaunchKernel(struct kernel *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra)
{
    if (extra || !gx || (kernel->device >= 0 && kernel->device != current) ||
        (kernel->device < 0 && shared > 48 << 10 && kernel->shared[current] < (int)shared))
        return 1;
    pthread_mutex_lock(&lock);
    lazy += !kernel->loaded[current];
    struct record *record = &records[count++ % MOST];
    *record = (struct record){kernel->name, kernel->code, {gx, gy, gz}, {bx, by, bz}, shared, current, 0, stream, {0}};
    for (; params[record->count]; record->count++) /* libmm1 ends them with NULL */
        memcpy(&record->args[record->count], params[record->count], 8);
    pthread_mutex_unlock(&lock);
    return 0;
}
int hipModuleLaunchKernel(struct kernel *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **params, void **extra)
{
    return cuLaunchKernel(kernel, gx, gy, gz, bx, by, bz, shared, stream, params, extra);
}
