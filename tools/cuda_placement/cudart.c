/* The functions of the CUDA runtime (13) that onnxruntime's CUDA provider calls while it opens a
 * session and runs the host side of its kernels. No kernel runs. Device memory is not readable by
 * the host: each allocation has two mappings, and only these functions use the readable one. Kernels
 * write nothing, so copying back returns what was copied to the device, or zeros.
 *
 * Fields of structures are written at their offsets in driver_types.h of CUDA 13.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, PAGE = 4096, BLOCKS = 65536 };
enum { DEVICE_PROPERTIES = 1008, POINTER_ATTRIBUTES = 88, DEVICE_MEMORY = 2 };

/* A device like an H100: compute capability 9.0. */
static const int MAJOR = 9, MINOR = 0, PROCESSORS = 132, THREADS = 1024, WARP = 32;
static const size_t MEMORY = 80ull << 30, SHARED = 49152, SHARED_OPTIN = 232448;

static void put_int(void *base, size_t at, int value) { memcpy((char *)base + at, &value, 4); }
static void put_size(void *base, size_t at, size_t value) { memcpy((char *)base + at, &value, 8); }

int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaSetDevice(int device) { return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 13050; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = 13050; return SUCCESS; }

int cudaGetDeviceProperties(void *to, int device) {
  memset(to, 0, DEVICE_PROPERTIES);
  strcpy(to, "stub");
  put_size(to, 288, MEMORY);
  put_size(to, 296, SHARED);
  put_int(to, 304, 65536); /* registers per block */
  put_int(to, 308, WARP);
  put_int(to, 320, THREADS);
  put_int(to, 324, 1024), put_int(to, 328, 1024), put_int(to, 332, 64);         /* of a block */
  put_int(to, 336, 2147483647), put_int(to, 340, 65535), put_int(to, 344, 65535); /* of a grid */
  put_int(to, 360, MAJOR);
  put_int(to, 364, MINOR);
  put_int(to, 384, PROCESSORS);
  put_int(to, 596, 50 << 20); /* level 2 cache */
  put_int(to, 604, 2 * THREADS);
  put_size(to, 624, 233472); /* shared memory of a multiprocessor */
  put_size(to, 672, SHARED_OPTIN);
  return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = THREADS; break;       /* cudaDevAttrMaxThreadsPerBlock */
    case 16: *value = PROCESSORS; break;   /* cudaDevAttrMultiProcessorCount */
    case 75: *value = MAJOR; break;        /* cudaDevAttrComputeCapabilityMajor */
    case 76: *value = MINOR; break;        /* cudaDevAttrComputeCapabilityMinor */
    case 97: *value = SHARED_OPTIN; break; /* cudaDevAttrMaxSharedMemoryPerBlockOptin */
    default: *value = 0;
  }
  return SUCCESS;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = MEMORY, *free_bytes = MEMORY - (10ull << 30);
  return SUCCESS;
}

/* -- memory ------------------------------------------------------------------------------------ */

static struct { char *device, *host; size_t size; } blocks[BLOCKS];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The address at which the host can access `pointer`: the readable mapping of device memory. */
static char *readable(const void *pointer) {
  char *result = (char *)pointer;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used; i++)
    if (blocks[i].device && result >= blocks[i].device && result < blocks[i].device + blocks[i].size) {
      result = blocks[i].host + (result - blocks[i].device);
      break;
    }
  pthread_mutex_unlock(&lock);
  return result;
}

int cudaMalloc(void **to, size_t size) {
  size = size ? (size + PAGE - 1) / PAGE * PAGE : PAGE;
  int file = memfd_create("device", 0);
  if (file < 0 || ftruncate(file, size)) return OUT_OF_MEMORY;
  char *device = mmap(0, size, PROT_NONE, MAP_SHARED, file, 0);
  char *host = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (device == MAP_FAILED || host == MAP_FAILED) return OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < used && blocks[i].device) i++;
  if (i == BLOCKS) { pthread_mutex_unlock(&lock); return OUT_OF_MEMORY; }
  if (i == used) used++;
  blocks[i].device = device, blocks[i].host = host, blocks[i].size = size;
  pthread_mutex_unlock(&lock);
  *to = device;
  return SUCCESS;
}

int cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  for (int i = 0; pointer && i < used; i++)
    if (blocks[i].device == pointer) {
      munmap(blocks[i].device, blocks[i].size);
      munmap(blocks[i].host, blocks[i].size);
      blocks[i].device = 0;
      break;
    }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
int cudaFreeAsync(void *pointer, void *stream) { return cudaFree(pointer); }

static int host_memory(void **to, size_t size) {
  return posix_memalign(to, 256, size ? size : 256) ? OUT_OF_MEMORY : SUCCESS;
}
int cudaMallocHost(void **to, size_t size) { return host_memory(to, size); }
int cudaHostAlloc(void **to, size_t size, unsigned flags) { return host_memory(to, size); }
int cudaFreeHost(void *pointer) { free(pointer); return SUCCESS; }

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  if (size) memmove(readable(to), readable(from), size);
  return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) {
  if (size) memset(readable(to), value, size);
  return SUCCESS;
}
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
  return cudaMemset(to, value, size);
}

int cudaPointerGetAttributes(void *to, const void *pointer) {
  memset(to, 0, POINTER_ATTRIBUTES);
  put_int(to, 0, DEVICE_MEMORY);
  return SUCCESS;
}

/* -- streams, graphs, kernels ------------------------------------------------------------------ */

static int token; /* the target of all handles, which only must not be null */
static int handle(void **to) { *to = &token; return SUCCESS; }

int cudaStreamCreate(void **to) { return handle(to); }
int cudaStreamCreateWithFlags(void **to, unsigned flags) { return handle(to); }
int cudaEventCreate(void **to) { return handle(to); }
int cudaEventCreateWithFlags(void **to, unsigned flags) { return handle(to); }
int cudaEventElapsedTime(float *to, void *start, void *end) { *to = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamEndCapture(void *stream, void **graph) { return handle(graph); }
int cudaGraphInstantiate(void **to, void *graph, unsigned long long flags) { return handle(to); }

const char *cudaGetErrorName(int error) { return "stub"; }
const char *cudaGetErrorString(int error) { return "stub"; }
void **__cudaRegisterFatBinary(void *binary) { static void *handles[4]; return handles; }
unsigned __cudaPushCallConfiguration(void) { return SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *to, const void *kernel, int size, size_t shared, unsigned flags) {
  *to = 1;
  return SUCCESS;
}
static long nothing(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(
    const char *symbol, void **to, unsigned version, unsigned long long flags, int *status) {
  *to = (void *)nothing;
  if (status) *status = 0;
  return SUCCESS;
}
