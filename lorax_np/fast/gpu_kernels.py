"""CUDA source of what cuBLAS does not do: dropout by counter, DoRA's row norms, sums over tokens, short passes.

The tests compile each kernel for several devices by NVRTC, and run it as C++ on the CPU.
The words of a mask are those of specs/dropout.md, (dropout.3) to (dropout.6); 1/(1 − p) rides on products.
No header is used, so that compiling needs nothing but NVRTC.
"""

CTYPES = {"float32": "float", "float64": "double", "float16": "half16", "bfloat16": "brain16"}
THREADS = 256  # of a block
ENTRIES = 16  # that one thread writes: those of one Philox block
COLUMNS = 32  # that a block of column_sums adds up
STRIPES = 16  # of tokens, each added up by blocks of its own
ROWS = 8  # whose norms one block takes, so that what it reads of A serves them all

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
    for (int i = 0; i < 16; ++i)  // all loops over entries are of 16, so that the entries stay in registers
      if (i < count) to[i] = from[i];
}

template <class T> __device__ inline void store(T* to, const T* from, int count, bool whole) {
  load<T>(from, to, count, whole);
}

__device__ inline bool aligned(const void* at) { return ((u64)at & 15u) == 0; }

// this thread's 16 entries: where they start, how many there are, and whether they lie whole
#define MINE \
  u64 start = 16 * (blockIdx.x * (u64)blockDim.x + threadIdx.x); \
  if (start >= count) return; \
  int some = count - start < 16 ? (int)(count - start) : 16;
#define FITS(p) (some == 16 && aligned(p))

// the numbers of `in` that the mask keeps, else 0, where w holds its words
template <class X, class Q>
__device__ inline void masked(Q* to, const X* in, const u64 w[4], u32 dropped) {
  for (int i = 0; i < 16; ++i) {
    u32 lane = (u32)(w[i / 4] >> (16 * (i % 4))) & 0xffffu;
    if (lane >= dropped) narrow(wide(in[i]), to[i]); else narrow(0.0f, to[i]);
  }
}

// out = x where the mask keeps it, else 0, in the dtype of out; 16 entries a thread
template <class X, class Q>
__global__ void keep(Q* out, const X* x, u64 count, KEY) {
  MINE
  alignas(16) X in[16];
  alignas(16) Q to[16];
  u64 w[4];
  load(x + start, in, some, FITS(x));
  philox(start / 16, seed, site, at ? *at : step, c2, c3, w);
  masked(to, in, w, dropped);
  store(out + start, to, some, FITS(out));
}

// the same of two arrays under one mask, which is made once: gx of t, and xd of x
template <class T, class X, class Q>
__global__ void keep_both(X* gx, const T* t, Q* xd, const X* x, u64 count, KEY) {
  MINE
  alignas(16) T from[16];
  alignas(16) X in[16], to[16];
  alignas(16) Q kept[16];
  u64 w[4];
  load(t + start, from, some, FITS(t));
  load(x + start, in, some, FITS(x));
  philox(start / 16, seed, site, at ? *at : step, c2, c3, w);
  masked(to, from, w, dropped);
  masked(kept, in, w, dropped);
  store(gx + start, to, some, FITS(gx));
  store(xd + start, kept, some, FITS(xd));
}

// ---- passes over tokens -----------------------------------------------------------------------------------

// out += t, rounded once
template <class Y, class T>
__global__ void add(Y* out, const T* t, u64 count) {
  MINE
  alignas(16) Y sum[16];
  alignas(16) T in[16];
  load(out + start, sum, some, FITS(out));
  load(t + start, in, some, FITS(t));
  for (int i = 0; i < 16; ++i) narrow(wide(sum[i]) + wide(in[i]), sum[i]);
  store(out + start, sum, some, FITS(out));
}

// out = k∘p + b by columns; b may be absent
template <class P, class Y, class K>
__global__ void by_columns(Y* out, const P* p, const K* k, const K* b, u64 count, u32 width) {
  MINE
  alignas(16) P in[16];
  alignas(16) Y to[16];
  u32 column = (u32)(start % width);
  load(p + start, in, some, FITS(p));
  for (int i = 0; i < 16; ++i) {
    narrow(k[column] * wide(in[i]) + (b ? b[column] : (K)0), to[i]);
    if (++column == width) column = 0;
  }
  store(out + start, to, some, FITS(out));
}

// y += c∘P + k∘Q by columns, rounded once; P += Q, which the backward reads      (dora.7), (dora.10)
template <class Y, class K>
__global__ void magnify(Y* y, K* P, const K* Q, const K* c, const K* k, u64 count, u32 width) {
  MINE
  alignas(16) Y sum[16];
  alignas(16) K p[16], q[16];
  u32 column = (u32)(start % width);
  load(y + start, sum, some, FITS(y));
  load(P + start, p, some, FITS(P));
  load(Q + start, q, some, FITS(Q));
  for (int i = 0; i < 16; ++i) {
    narrow(wide(sum[i]) + (c[column] * p[i] + k[column] * q[i]), sum[i]);
    p[i] += q[i];
    if (++column == width) column = 0;
  }
  store(y + start, sum, some, FITS(y));
  store(P + start, p, some, FITS(P));
}

// ---- sums, in float64 and in one order --------------------------------------------------------------------

// sums of g, or of g∘p, by columns over each stripe of tokens                    (linear.5), (dora.10)
template <class G, class P>
__global__ void column_sums(double* parts, const G* g, const P* p, u32 tokens, u32 width, u32 stripes) {
  __shared__ double part[256];
  u32 stripe = blockIdx.x % stripes, column = blockIdx.x / stripes * 32 + threadIdx.x % 32;
  u32 lines = blockDim.x / 32, step = lines * stripes;
  double sum = 0;
  if (column < width)
    for (u32 t = stripe * lines + threadIdx.x / 32; t < tokens; t += step) {
      u64 at = (u64)t * width + column;
      sum += (double)wide(g[at]) * (p ? (double)wide(p[at]) : 1.0);
    }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || column >= width) return;
  for (u32 i = 1; i < lines; ++i) sum += part[threadIdx.x + 32 * i];
  parts[(u64)stripe * width + column] = sum;
}

// entries j of 8 rows of W + BA, which share what is read of A; `up` holds B's in shared memory where r allows
#define R_SHARED 64
template <class W, class C>
__device__ inline void entries(
    C v[8], const W* w, const C* a, const C* b, const Pack<C, 8>* up, int rows, u32 d_in, u32 r, u32 j) {
  C update[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < 8; ++i) v[i] = i < rows ? (C)wide(w[(u64)i * d_in + j]) : (C)0;
  for (u32 q = 0; q < r; ++q) {
    C along = a[(u64)q * d_in + j];
    if (up) {
      Pack<C, 8> of = up[q];
      for (int i = 0; i < 8; ++i) update[i] += of.v[i] * along;
    } else {
      for (int i = 0; i < rows; ++i) update[i] += b[(u64)i * r + q] * along;
    }
  }
  for (int i = 0; i < 8; ++i) v[i] += update[i];
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

// n = ‖W + BA‖ of 8 rows a block, s having gone into B; NaN for a row of zeros.  (dora.1) to (dora.3)
template <class W, class C>
__global__ void row_norms(double* n, const W* w, const C* a, const C* b, u32 d_out, u32 d_in, u32 r) {
  __shared__ double part[256];
  __shared__ Pack<C, 8> shared[R_SHARED];
  u32 first = blockIdx.x * 8;
  int rows = d_out - first < 8 ? (int)(d_out - first) : 8;
  C v[8];
  double top[8], sum[8];
  w += (u64)first * d_in;
  b += (u64)first * r;
  const Pack<C, 8>* up = r <= R_SHARED ? shared : 0;
  if (up)
    for (u32 e = threadIdx.x; e < 8 * r; e += blockDim.x)
      shared[e / 8].v[e % 8] = (int)(e % 8) < rows ? b[(u64)(e % 8) * r + e / 8] : (C)0;
  __syncthreads();
  for (int i = 0; i < 8; ++i) { top[i] = sizeof(C) == 8 ? 0.0 : 1.0; sum[i] = 0; }
  if (sizeof(C) == 8) {  // squares of float32 neither overflow nor vanish in float64
    for (u32 j = threadIdx.x; j < d_in; j += blockDim.x) {
      entries(v, w, a, b, up, rows, d_in, r, j);
      for (int i = 0; i < 8; ++i) top[i] = fmax(top[i], fabs((double)v[i]));
    }
    for (int i = 0; i < 8; ++i) top[i] = reduced(top[i], part, true);
  }
  for (u32 j = threadIdx.x; j < d_in; j += blockDim.x) {
    entries(v, w, a, b, up, rows, d_in, r, j);
    for (int i = 0; i < 8; ++i) sum[i] += (double)v[i] / top[i] * ((double)v[i] / top[i]);
  }
  for (int i = 0; i < 8; ++i) {
    double all = reduced(sum[i], part, false);
    if (threadIdx.x == 0 && i < rows) n[first + i] = all > 0 ? top[i] * sqrt(all) : 0.0 / all;
  }
}
"""


def name_of(kernel: str, *dtypes: str) -> str:
    """A kernel for certain dtypes, or numbers, as NVRTC knows it.

    >>> name_of("keep", "bfloat16", "float32")
    'keep<brain16, float>'
    """
    return f"{kernel}<{', '.join(CTYPES.get(dtype, dtype) for dtype in dtypes)}>"


def every_kernel() -> tuple[str, ...]:
    """Each kernel for each combination of dtypes that the plan may ask for."""
    kinds, wide = tuple(CTYPES), ("float32", "float64")
    names = [name_of(k, a, b) for k in ("keep", "add", "column_sums") for a in kinds for b in kinds]
    stored = [(x, q) for x in kinds for q in dict.fromkeys((x, *wide))]
    names += [name_of("keep_both", t, x, q) for x, q in stored for t in dict.fromkeys((q, *wide))]
    names += [name_of("by_columns", a, b, c) for a in kinds for b in kinds for c in wide]
    return tuple(names + [name_of(k, a, b) for k in ("magnify", "row_norms") for a in kinds for b in wide])
