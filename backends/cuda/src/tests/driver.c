/* A driver without a GPU, of version VERSION, whose cuInit returns INIT. OLD: it has no memory pools. */

#define EMPTY(name) int name(void) { return 0; }

EMPTY(cuCtxEnablePeerAccess) EMPTY(cuCtxGetStreamPriorityRange) EMPTY(cuCtxPopCurrent_v2) EMPTY(cuCtxPushCurrent_v2)
EMPTY(cuDeviceCanAccessPeer) EMPTY(cuDeviceGet) EMPTY(cuDeviceGetAttribute) EMPTY(cuDeviceGetName)
EMPTY(cuDevicePrimaryCtxRetain) EMPTY(cuDeviceTotalMem_v2) EMPTY(cuEventCreate)
EMPTY(cuEventElapsedTime) EMPTY(cuEventQuery) EMPTY(cuEventRecord) EMPTY(cuFuncSetAttribute) EMPTY(cuLaunchKernel)
EMPTY(cuMemAllocFromPoolAsync) EMPTY(cuMemAlloc_v2) EMPTY(cuMemFreeAsync) EMPTY(cuMemFreeHost) EMPTY(cuMemFree_v2)
EMPTY(cuMemGetInfo_v2) EMPTY(cuMemHostAlloc) EMPTY(cuMemPoolGetAttribute) EMPTY(cuMemPoolSetAttribute)
EMPTY(cuMemPoolTrimTo) EMPTY(cuMemcpy2DAsync_v2) EMPTY(cuMemcpyAsync) EMPTY(cuMemcpyDtoHAsync_v2)
EMPTY(cuMemcpyHtoDAsync_v2) EMPTY(cuMemsetD16Async) EMPTY(cuMemsetD32Async) EMPTY(cuModuleGetFunction)
EMPTY(cuModuleLoadData) EMPTY(cuPointerGetAttribute) EMPTY(cuStreamCreateWithPriority) EMPTY(cuStreamDestroy_v2)
EMPTY(cuStreamGetCtx) EMPTY(cuStreamWaitEvent)
#ifndef OLD
EMPTY(cuMemPoolCreate)
#endif

int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cuDeviceGetCount(int *count) { return *count = 0, 0; }
int cuGetErrorName(int code, const char **name) { return *name = code ? "ITS_NAME" : "", 0; }
int cuGetErrorString(int code, const char **text) { return *text = code ? "its text" : "", 0; }
