"""CUDA source of what cuBLAS does not do: dropout by counter, DoRA's row norms, sums over tokens, short passes.

Not run on a GPU: compiled for several by NVRTC, and each kernel run as C++ on the CPU, by the tests.
The words of a mask are those of specs/dropout.md, (dropout.3) to (dropout.6); 1/(1 − p) rides on products.
No header is used, so that compiling needs nothing but NVRTC.
"""

CTYPES = {"float32": "float", "float64": "double", "float16": "half16", "bfloat16": "brain16"}
THREADS = 256  # of a block
LANES = 16  # entries of one Philox block, which one thread writes
COLUMNS = 32  # that a block of column_sums adds up

SOURCE = r"""
typedef unsigned long long u64;
typedef unsigned int u32;
struct half16 { unsigned short bits; };
struct brain16 { unsigned short bits; };

// ---- storage dtypes, rounded to nearest, ties to even -----------------------------------------------------

__device__ inline float wide(float v) { return v; }
__device__ inline double wide(double v) { return v; }
__device__ inline float wide(brain16 v) { return __uint_as_float((u32)v.bits << 16); }
__device__ inline float wide(half16 v) {
  u32 sign = (u32)(v.bits & 0x8000u) << 16, rest = (u32)(v.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return __uint_as_float(sign | 0x7f800000u | rest);  // infinity or NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}

__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(float v, double& out) { out = v; }
__device__ inline void narrow(double v, double& out) { out = v; }
__device__ inline void narrow(double v, float& out) { out = (float)v; }
__device__ inline void narrow(float v, brain16& out) {
  u32 u = __float_as_uint(v);
  bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = (unsigned short)(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
__device__ inline void narrow(float v, half16& out) {
  u32 u = __float_as_uint(v), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  if (size > 0x7f800000u) size = 0x7e00u;
  else if (size >= 0x47800000u) size = 0x7c00u;
  else if (size < 0x38800000u) size = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
  else size = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  out.bits = (unsigned short)(sign | size);
}
__device__ inline float odd(double v) {  // to float32 so that a second rounding decides as the only one would
  float near = (float)v;
  u32 u = __float_as_uint(near);
  if ((double)near == v || v != v) return near;
  if (fabs((double)near) > fabs(v)) u -= 1;
  return __uint_as_float(u | 1u);
}
__device__ inline void narrow(double v, brain16& out) { narrow(odd(v), out); }
__device__ inline void narrow(double v, half16& out) { narrow(odd(v), out); }

// ---- Philox4x64-10 ----------------------------------------------------------------------------------------

// the words of a key, then T; where `at` is given, the step stands there on the device
#define KEY u64 seed, u64 site, u64 step, u64 c2, u64 c3, u32 dropped, const u64* at

__device__ inline void philox(u64 block, u64 k0, u64 k1, u64 c1, u64 c2, u64 c3, u64 w[4]) {
  u64 c0 = block;
  for (int i = 0; i < 10; ++i) {
    u64 hi0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), lo0 = 0xD2E7470EE14C6C93ull * c0;
    u64 hi1 = __umul64hi(0xCA5A826395121157ull, c2), lo1 = 0xCA5A826395121157ull * c2;
    c0 = hi1 ^ c1 ^ k0; c1 = lo1; c2 = hi0 ^ c3 ^ k1; c3 = lo0;
    k0 += 0x9E3779B97F4A7C15ull; k1 += 0xBB67AE8584CAA73Bull;
  }
  w[0] = c0; w[1] = c1; w[2] = c2; w[3] = c3;
}

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T v[N]; };  // one load or store of 16 bytes

template <class T> __device__ inline void load(const T* from, T* to, int count, bool whole) {
  constexpr int N = 16 / sizeof(T);
  if (whole)
    for (int i = 0; i < 16; i += N) *(Pack<T, N>*)(to + i) = *(const Pack<T, N>*)(from + i);
  else
    for (int i = 0; i < count; ++i) to[i] = from[i];
}

template <class T> __device__ inline void store(T* to, const T* from, int count, bool whole) {
  load<T>(from, to, count, whole);
}

__device__ inline bool aligned(const void* at) { return ((u64)at & 15u) == 0; }

// out = x where the mask keeps it, else 0, in the dtype of out; 16 entries a thread
template <class X, class Q>
__global__ void keep(Q* out, const X* x, u64 count, KEY) {
  u64 block = blockIdx.x * (u64)blockDim.x + threadIdx.x, start = 16 * block;
  if (start >= count) return;
  int some = count - start < 16 ? (int)(count - start) : 16;
  alignas(16) X in[16];
  alignas(16) Q to[16];
  u64 w[4];
  load(x + start, in, some, some == 16 && aligned(x));
  philox(block, seed, site, at ? *at : step, c2, c3, w);
  for (int i = 0; i < some; ++i) {
    u32 lane = (u32)(w[i / 4] >> (16 * (i % 4))) & 0xffffu;
    if (lane >= dropped) narrow(wide(in[i]), to[i]); else narrow(0.0f, to[i]);
  }
  store(out + start, to, some, some == 16 && aligned(out));
}

// out += t where the mask keeps it, rounded once
template <class Y, class T>
__global__ void add_kept(Y* out, const T* t, u64 count, KEY) {
  u64 block = blockIdx.x * (u64)blockDim.x + threadIdx.x, start = 16 * block;
  if (start >= count) return;
  int some = count - start < 16 ? (int)(count - start) : 16;
  alignas(16) Y sum[16];
  alignas(16) T in[16];
  u64 w[4];
  load(out + start, sum, some, some == 16 && aligned(out));
  load(t + start, in, some, some == 16 && aligned(t));
  philox(block, seed, site, at ? *at : step, c2, c3, w);
  for (int i = 0; i < some; ++i) {
    u32 lane = (u32)(w[i / 4] >> (16 * (i % 4))) & 0xffffu;
    if (lane >= dropped) narrow(wide(sum[i]) + wide(in[i]), sum[i]);
  }
  store(out + start, sum, some, some == 16 && aligned(out));
}

// ---- passes over tokens -----------------------------------------------------------------------------------

// out += t, rounded once
template <class Y, class T>
__global__ void add(Y* out, const T* t, u64 count) {
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  if (i < count) narrow(wide(out[i]) + wide(t[i]), out[i]);
}

// out = k∘p + b by columns; b may be absent
template <class P, class Y, class K>
__global__ void by_columns(Y* out, const P* p, const K* k, const K* b, u64 count, u32 width) {
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  if (i >= count) return;
  u32 column = (u32)(i % width);
  narrow(k[column] * wide(p[i]) + (b ? b[column] : (K)0), out[i]);
}

// y += c∘P + k∘Q by columns, rounded once; P += Q, which the backward reads      (dora.7), (dora.10)
template <class Y, class K>
__global__ void magnify(Y* y, K* P, const K* Q, const K* c, const K* k, u64 count, u32 width) {
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  if (i >= count) return;
  u32 column = (u32)(i % width);
  K p = P[i], q = Q[i];
  narrow(wide(y[i]) + (c[column] * p + k[column] * q), y[i]);
  P[i] = p + q;
}

// ---- sums, in float64 and in one order --------------------------------------------------------------------

// sums over tokens of g, or of g∘p, by columns                                   (linear.5), (dora.10)
template <class G, class P>
__global__ void column_sums(double* out, const G* g, const P* p, u32 tokens, u32 width) {
  __shared__ double part[256];
  u32 column = blockIdx.x * 32 + threadIdx.x % 32, step = blockDim.x / 32;
  double sum = 0;
  if (column < width)
    for (u32 t = threadIdx.x / 32; t < tokens; t += step) {
      u64 at = (u64)t * width + column;
      sum += (double)wide(g[at]) * (p ? (double)wide(p[at]) : 1.0);
    }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || column >= width) return;
  for (u32 i = 1; i < step; ++i) sum += part[threadIdx.x + 32 * i];
  out[column] = sum;
}

template <class C> __device__ inline C entry(C w, const C* a, const C* b, u32 d_in, u32 r) {
  C update = 0;
  for (u32 q = 0; q < r; ++q) update += b[q] * a[(u64)q * d_in];
  return w + update;
}

__device__ inline double reduced(double mine, double* part, bool largest) {
  part[threadIdx.x] = mine;
  __syncthreads();
  for (u32 half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) {
      double other = part[threadIdx.x + half];
      part[threadIdx.x] = largest ? fmax(part[threadIdx.x], other) : part[threadIdx.x] + other;
    }
    __syncthreads();
  }
  double all = part[0];
  __syncthreads();
  return all;
}

// n = ‖W + BA‖ of one row a block, s having gone into B; NaN for a row of zeros.  (dora.1) to (dora.3)
template <class W, class C>
__global__ void row_norms(double* n, const W* w, const C* a, const C* b, u32 d_in, u32 r) {
  __shared__ double part[256];
  const W* row = w + (u64)blockIdx.x * d_in;
  const C* up = b + (u64)blockIdx.x * r;
  double top = 1.0, sum = 0;
  if (sizeof(C) == 8) {  // squares of float32 neither overflow nor vanish in float64
    double mine = 0;
    for (u32 j = threadIdx.x; j < d_in; j += blockDim.x)
      mine = fmax(mine, fabs((double)entry((C)wide(row[j]), a + j, up, d_in, r)));
    top = reduced(mine, part, true);
  }
  for (u32 j = threadIdx.x; j < d_in; j += blockDim.x) {
    double v = (double)entry((C)wide(row[j]), a + j, up, d_in, r) / top;
    sum += v * v;
  }
  sum = reduced(sum, part, false);
  if (threadIdx.x == 0) n[blockIdx.x] = sum > 0 ? top * sqrt(sum) : 0.0 / sum;
}
"""


def name_of(kernel: str, *dtypes: str) -> str:
    """A kernel for certain dtypes, as NVRTC knows it.

    >>> name_of("keep", "bfloat16", "float32")
    'keep<brain16, float>'
    """
    return f"{kernel}<{', '.join(CTYPES[dtype] for dtype in dtypes)}>"


def every_kernel() -> tuple[str, ...]:
    """Each kernel for each combination of dtypes that the plan may ask for."""
    kinds, wide = tuple(CTYPES), ("float32", "float64")
    names = [name_of(k, a, b) for k in ("keep", "add_kept", "add", "column_sums") for a in kinds for b in kinds]
    names += [name_of("by_columns", a, b, c) for a in kinds for b in kinds for c in wide]
    return tuple(names + [name_of(k, a, b) for k in ("magnify", "row_norms") for a in kinds for b in wide])
