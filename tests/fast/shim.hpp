// CUDA's words for a C++ compiler: the same kernels run on the CPU, thread after thread, block after block.
// Threads of a block are fibres, so that __syncthreads() waits as it does on a device.
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

struct Place { unsigned x; };
static Place blockIdx, blockDim, threadIdx;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibres;
static std::vector<char> over;

static inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
static inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static void __syncthreads() {
  unsigned me = threadIdx.x;
  swapcontext(&fibres[me], &scheduler);
  threadIdx.x = me;
}

template <class F> struct Call { static F* body; };
template <class F> F* Call<F>::body;
template <class F> static void fibre() {
  unsigned me = threadIdx.x;
  (*Call<F>::body)();
  over[me] = 1;
}

template <class F> static void run(unsigned grid, unsigned block, F body) {
  const size_t stack = 1 << 16;
  std::vector<char> stacks(stack * block);
  blockDim.x = block;
  Call<F>::body = &body;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    fibres.assign(block, ucontext_t());
    over.assign(block, 0);
    for (unsigned i = 0; i < block; ++i) {
      getcontext(&fibres[i]);
      fibres[i].uc_stack.ss_sp = &stacks[i * stack];
      fibres[i].uc_stack.ss_size = stack;
      fibres[i].uc_link = &scheduler;
      makecontext(&fibres[i], fibre<F>, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      for (unsigned i = 0; i < block; ++i)
        if (!over[i]) {
          threadIdx.x = i;
          swapcontext(&scheduler, &fibres[i]);
          alive = alive || !over[i];
        }
    }
  }
}

template <class... P, size_t... I>
static int launched(void (*kernel)(P...), unsigned grid, unsigned block, void** a, const int* sizes, int count,
                    std::index_sequence<I...>) {
  const int wanted[] = {(int)sizeof(P)...};
  if (count != (int)sizeof...(P)) return -1;
  for (int i = 0; i < count; ++i)
    if (wanted[i] != sizes[i]) return i + 1;
  run(grid, block, [=] { kernel(*(P*)a[I]...); });
  return 0;
}
template <class... P>
static int launch(void (*kernel)(P...), unsigned grid, unsigned block, void** a, const int* sizes, int count) {
  return launched(kernel, grid, block, a, sizes, count, std::index_sequence_for<P...>());
}
