// CUDA's words for a C++ compiler: the same kernels run on the CPU, thread after thread, block after block.
// Threads of a block are fibres, so that __syncthreads() waits as it does on a device.
#include <math.h>
#include <setjmp.h>
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
static jmp_buf scheduler;
struct Fibre { ucontext_t begin; jmp_buf at; bool begun, over; };
static std::vector<Fibre> fibres;

// by jumps, once a fibre has begun: a switch of contexts asks the kernel each time
static void wait_for_turn() {
  unsigned me = threadIdx.x;
  if (!_setjmp(fibres[me].at)) _longjmp(scheduler, 1);
  threadIdx.x = me;
}
static void turn_of(unsigned i) {
  if (_setjmp(scheduler)) return;
  threadIdx.x = i;
  if (fibres[i].begun) _longjmp(fibres[i].at, 1);
  fibres[i].begun = true;
  setcontext(&fibres[i].begin);
}

static inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
static inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static void __syncthreads() { wait_for_turn(); }

template <class F> struct Call { static F* body; };
template <class F> F* Call<F>::body;
template <class F> static void fibre() {  // of one thread, in block after block
  unsigned me = threadIdx.x;
  for (;;) {
    (*Call<F>::body)();
    fibres[me].over = true;
    wait_for_turn();
  }
}

template <class F> static void run(unsigned grid, unsigned block, F body) {
  const size_t stack = 1 << 16;
  std::vector<char> stacks(stack * block);
  blockDim.x = block;
  Call<F>::body = &body;
  fibres = std::vector<Fibre>(block);
  for (unsigned i = 0; i < block; ++i) {
    getcontext(&fibres[i].begin);
    fibres[i].begin.uc_stack.ss_sp = &stacks[i * stack];
    fibres[i].begin.uc_stack.ss_size = stack;
    makecontext(&fibres[i].begin, fibre<F>, 0);
  }
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    for (unsigned i = 0; i < block; ++i) fibres[i].over = false;
    for (bool alive = true; alive;) {
      alive = false;
      for (unsigned i = 0; i < block; ++i)
        if (!fibres[i].over) {
          turn_of(i);
          alive = alive || !fibres[i].over;
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
